"""What changes in PEFT for QLinear: a few functions, each of which stays PEFT's own for every other layer."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from ...errors import listed
from ...layers.packed import PackedLayer
from ...layers.qlinear import QLinear
from ...models.experts import adapted_layers
from ...models.targets import qlora_layers
from .own_adapters import check_own_adapters, check_parameters, drop_own_adapters


def _base_of(layer: nn.Module) -> nn.Module:
    """The layer inside PEFT's wrappers."""
    while isinstance(inner := getattr(layer, "base_layer", None), nn.Module):
        layer = inner
    return layer


def _lora_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """dispatch_default, which makes PEFT's LoRA layer for a target."""

    @functools.wraps(original)
    def dispatch_default(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(_base_of(target), QLinear) or kwargs.get("parameter_name") is not None:
            return original(target, adapter_name, *args, **kwargs)
        from .layer import make_layer

        return make_layer(target, adapter_name, *args, **kwargs)

    return dispatch_default


def _dense_weight(original: Callable[..., Any]) -> Callable[..., Any]:
    """dequantize_module_weight, from which DoRA has the base weight."""

    @functools.wraps(original)
    def dequantize_module_weight(module: nn.Module) -> Any:
        if isinstance(module, PackedLayer):
            return module.weight.dequantize(module.dtype)
        return original(module)

    return dequantize_module_weight


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    """prepare_model_for_kbit_training, which turns gradient checkpointing on only for models that it knows as 4-bit."""

    @functools.wraps(original)
    def prepare_model_for_kbit_training(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(model, "is_loaded_in_4bit", False) or next(iter(adapted_layers(model)), None) is None:
            return original(model, *args, **kwargs)
        before = model.__dict__.get("is_loaded_in_4bit")
        model.__dict__["is_loaded_in_4bit"] = True
        try:
            return original(model, *args, **kwargs)
        finally:
            del model.__dict__["is_loaded_in_4bit"]
            if before is not None:
                model.__dict__["is_loaded_in_4bit"] = before

    return prepare_model_for_kbit_training


def _inject(original: Callable[..., Any]) -> Callable[..., Any]:
    """BaseTuner.inject_adapter, which every adapter method of PEFT goes through."""

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        _check_trained(model, getattr(config, "modules_to_save", None) or ())
        check_parameters(model, getattr(config, "target_parameters", None) or ())
        check_own_adapters(model)
        with _no_targets_inside(self, model):
            result = original(self, model, adapter_name, *args, **kwargs)
        # PEFT turns names of transformers 4, such as w1, into target_parameters on the way.
        check_parameters(model, getattr(config, "target_parameters", None) or ())
        drop_own_adapters(model)
        return result

    return inject_adapter


@contextlib.contextmanager
def _no_targets_inside(tuner: Any, model: nn.Module) -> Iterator[None]:
    """Within it an expression like ".*q_proj.*" matches no containers of a QLinear's own adapters, as on nn.Linear."""
    inside = {f"{name}.{child}" for name, layer in adapted_layers(model) for child, _ in layer.named_children()}
    original = tuner._check_target_module_exists

    def check(config: Any, key: str) -> Any:
        return False if key in inside else original(config, key)

    tuner.__dict__["_check_target_module_exists"] = check
    try:
        yield
    finally:
        del tuner.__dict__["_check_target_module_exists"]


def _check_trained(model: nn.Module, names: Sequence[str]) -> None:
    """Refuses modules_to_save that are 4-bit: only dense modules can be trained themselves."""
    packed = [name.removesuffix(".base_layer") for name, module in adapted_layers(model)]
    for name in names:
        inside = [layer for layer in packed if f".{layer}.".find(f".{name}.") >= 0 or layer.endswith(name)]
        if inside:
            raise ValueError(
                f"modules_to_save = {name!r} cannot be trained: it is 4-bit ({listed(inside, 3)}). "
                f"Leave it dense: quantize_model(model, skip=[{name!r}, ...])"
            )


def _refuse_corda(original: Callable[..., Any]) -> Callable[..., Any]:
    """preprocess_corda, which writes to the layers and decomposes their dense weights."""

    @functools.wraps(original)
    def preprocess_corda(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if next(iter(qlora_layers(model)), None) is not None:
            raise ValueError(
                "CorDA needs the dense weights, and this model is 4-bit already; prepare the dense model, save its "
                "base and the adapter, then quantize that base with rank=0 and load the adapter onto it"
            )
        return original(model, *args, **kwargs)

    return preprocess_corda


def _replace(module: ModuleType, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a function of a module, and wherever else it was imported to under its own name."""
    original = getattr(module, name, None)
    if original is None:
        from importlib.metadata import version

        warnings.warn(
            f"peft {version('peft')} has no {module.__name__}.{name}, which qlora_kernels builds on; PEFT may not work "
            "on QLinear layers. Install a version that docs/peft.md names.",
            stacklevel=2,
        )
        return
    replacement = wrap(original)
    # "from peft import ..." may have come before "import qlora_kernels".
    for other in list(sys.modules.values()):
        if isinstance(other, ModuleType) and other.__dict__.get(name) is original:
            setattr(other, name, replacement)
    setattr(module, name, replacement)


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    """PeftModel's constructor: prompt tuning and the like inject nothing, but neither train nor save the base."""

    @functools.wraps(original)
    def __init__(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_own_adapters(model)
        original(self, model, *args, **kwargs)
        drop_own_adapters(model)

    return __init__


def _count(original: Callable[..., Any]) -> Callable[..., Any]:
    """get_nb_trainable_parameters: of a 4-bit layer PEFT would count the bytes, half of the weight's elements."""

    @functools.wraps(original)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trainable, total = original(self)
        for _, layer in adapted_layers(self):
            total += math.prod(layer.weight.shape)
            total -= sum(piece.numel() for piece in layer.weight.pieces if isinstance(piece, nn.Parameter))
        return trainable, total

    return get_nb_trainable_parameters


def _change_tuners(module: ModuleType) -> None:
    tuner = module.BaseTuner
    tuner.inject_adapter = _inject(tuner.inject_adapter)


def _change_model(module: ModuleType) -> None:
    model = module.PeftModel
    model.__init__ = _init(model.__init__)
    model.get_nb_trainable_parameters = _count(model.get_nb_trainable_parameters)


def _change_mixed_model(module: ModuleType) -> None:
    model = module.PeftMixedModel
    model.get_nb_trainable_parameters = _count(model.get_nb_trainable_parameters)


#: What is done to each of PEFT's modules once it is imported.
CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "peft.utils.integrations": lambda module: _replace(module, "dequantize_module_weight", _dense_weight),
    "peft.utils.other": lambda module: _replace(module, "prepare_model_for_kbit_training", _prepare),
    "peft.tuners.tuners_utils": _change_tuners,
    "peft.peft_model": _change_model,
    "peft.mixed_model": _change_mixed_model,
    "peft.tuners.lora.model": lambda module: _replace(module, "dispatch_default", _lora_layer),
    "peft.tuners.lora.corda": lambda module: _replace(module, "preprocess_corda", _refuse_corda),
}
