"""The quantizer that transformers asks while it loads and saves models with 4-bit layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from ...errors import listed
from ...layers.adapters.config import AdapterConfig
from ...layers.qlinear import QLinear
from ...models.dense_layers import is_linear_like
from ...models.experts import adapted_layers
from ...models.heads import DEFAULT_SKIP, heads, new_heads
from ...models.places import Places, places_of
from ...models.quantize import QuantizeReport, bytes_of, choose_what_is_trained, report, swap_layers
from ...models.targets import Plan, plan, qlora_layers
from . import recorded
from .expert_stacks import Stacks, expert_modules, keep_merged, mark_as_initialized
from .live import check_savable, describe
from .nf4_config import NF4Config

logger = logging.getLogger(__name__)

_BITS = {True: 4.127, False: 4.5}  # a weight's, with and without double quantization

_NEW = "not in the checkpoint: new, dense and trainable"


class NF4Quantizer(HfQuantizer):
    """Loads models whose config has an :class:`NF4Config`, from dense checkpoints and from 4-bit ones.

    A dense checkpoint's layers stay nn.Linear without memory until their weight comes from the disk; then each becomes
    a QLinear, so that no more than one dense weight is in memory. A 4-bit checkpoint's are QLinear from the start, and
    their tensors are loaded by name.

    Attributes:
        report: what was quantized and what was left alone, after loading a dense checkpoint.
        dense_bytes: the model's parts that are not 4-bit, and the bytes of each.
    """

    requires_calibration = False

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # pyright: ignore[reportArgumentType]
        self.config = quantization_config
        self.report: QuantizeReport | None = None
        self.dense_bytes: dict[str, int] = {}
        self._loading: _Loading | None = None

    # ------------------------------------------------------------------------------------------- what transformers asks

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ImportError: for transformers 4, whose loading is another.
            ValueError: for a device_map with "disk".
        """
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(
                f"loading a 4-bit model with from_pretrained needs transformers 5, found {transformers.__version__}; "
                "load the dense model and call qlora_kernels.quantize_model"
            )
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("4-bit layers cannot be offloaded to the disk; give a device_map with devices and 'cpu'")

    @property
    def quantized_element_size(self) -> float:
        return _BITS[self.config.double_quant] / 8

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, kind = param_name.rpartition(".")
        if self._loading is None:
            return False
        return (kind == "weight" and name in self._loading.waiting) or param_name in self._loading.stacks.waiting

    def get_quantize_ops(self) -> Any:
        from .on_the_fly import QuantizeWeight

        return QuantizeWeight(self)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without it Trainer takes only quantized models with PEFT's adapters, not with QLinear's."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by save_pretrained before it writes: the config gets the settings that the model has now."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves PEFT's adapters alone
        if not any(adapted_layers(model)):  # all have become dense again
            self.remove_quantization_config(model)
            return None, {}
        check_savable(model)
        self._note(model)
        keep_merged(model)
        return None, {}

    def _note(self, model: Any) -> None:
        self.quantization_config = self.config = describe(model)  # pyright: ignore[reportAttributeAccessIssue]
        model.config.quantization_config = self.config

    # ------------------------------------------------------------------------------------------- before loading

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.config
        if self.pre_quantized:
            skip = recorded.skipped(model, config)
        else:
            skip = config.modules_to_not_convert
            skip = [*DEFAULT_SKIP, *heads(model)] if skip is None else skip
        new = recorded.missing_heads(model, kwargs.get("checkpoint_files"))
        more = [*_tied(model), *new]
        if isinstance(skip, str):
            skip = "|".join([f"(?:{skip})", *map(re.escape, more)])
        else:
            skip = [*skip, *more]
        adapter = AdapterConfig(config.rank, config.alpha, config.dropout, config.rslora)
        experts = recorded.experts(model, config.experts) if self.pre_quantized else ()
        planned = plan(
            model,
            adapter,
            config.target_modules,
            skip,
            config.double_quant,
            adapter_dtype=config.adapter_dtype,
            target_parameters=config.target_parameters,
            experts=experts if self.pre_quantized else True,
        )
        if self.pre_quantized:
            planned = replace(planned, experts=experts)
        self._loading = _Loading(model, planned, new, kwargs.get("checkpoint_files"), waiting=not self.pre_quantized)
        if self.pre_quantized:
            swap_layers(model, replace(planned, adapted=(), adapted_experts=()))
            recorded.restore(model, config)
            for _, layer in qlora_layers(model):
                _mark_as_initialized(layer)
            for experts_module in expert_modules(model).values():
                mark_as_initialized(experts_module)
        return model

    # ------------------------------------------------------------------------------------------- while loading

    def quantize(self, model: nn.Module, name: str, weight: torch.Tensor) -> bool:
        """Makes a layer of the model 4-bit, with the dense weight that has just been loaded for it.

        Its bias stays the parameter that it is, with or without data.

        Returns:
            Whether that was done: not for a weight of another shape, which transformers reports, unless it was asked to
            make such weights new.
        """
        loading = self._loading
        assert loading is not None  # only called while a model is loaded
        if name in loading.stacks.waiting:
            return self._quantize_experts(model, loading, name, weight)
        parent, key = loading.places[name][0]
        linear: Any = parent._modules[key]
        if linear.weight.shape != weight.shape:
            loading.waiting.discard(name)
            loading.misfits[f"{name}.weight"] = linear.weight.shape
            return False
        if loading.error is not None:  # raised when transformers has done its part
            return True
        bias = linear._parameters["bias"]
        linear._parameters["bias"] = None
        linear.weight = nn.Parameter(weight, requires_grad=False)
        try:
            swap_layers(
                model, replace(loading.planned, quantized=(name,), adapted=(), experts=()), found=loading.places
            )
        except (ValueError, TypeError, RuntimeError) as error:
            loading.error = error
            linear.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
            linear._parameters["bias"] = bias
            return True
        layer = model.get_submodule(name)
        assert isinstance(layer, QLinear)
        layer._parameters["bias"] = bias
        _mark_as_initialized(layer)
        loading.waiting.discard(name)
        return True

    def _quantize_experts(self, model: nn.Module, loading: _Loading, name: str, weights: torch.Tensor) -> bool:
        """The same for a mixture's weights, in one parameter of a module of experts."""
        expected = model.get_parameter(name).shape
        if weights.shape != expected:
            loading.stacks.waiting.discard(name)
            loading.misfits[name] = expected
            return False
        if loading.error is None:
            try:
                loading.stacks.quantize(model, name, weights, self.config.double_quant)
            except (ValueError, TypeError, RuntimeError) as error:
                loading.error = error
        return True

    # ------------------------------------------------------------------------------------------- after loading

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        loading, self._loading = self._loading, None
        assert loading is not None
        if loading.error is not None:
            raise loading.error
        self._loading = loading
        for name in [name for name in loading.planned.quantized if name in loading.waiting]:
            weight = model.get_parameter(f"{name}.weight")
            if getattr(weight, "_is_hf_initialized", False) and not weight.is_meta:
                self.quantize(model, name, weight.detach())  # loaded with other weights, by an operation of the model's
        for name in sorted(loading.stacks.waiting):
            weight = model.get_parameter(name)
            if getattr(weight, "_is_hf_initialized", False) and not weight.is_meta:
                self.quantize(model, name, weight.detach())
        self._loading = None
        if loading.error is not None:
            raise loading.error
        found_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for name, shape in {**loading.shapes, **loading.misfits}.items():  # transformers before 5.23 sets any shape
            found = found_shapes.get(name, shape)
            if found != shape:
                raise ValueError(f"{name} should be {list(shape)}, found {list(found)} in the checkpoint")
        if self.pre_quantized:
            recorded.check_loaded(model)
            recorded.check_dense(model, loading.files)
        if not any(adapted_layers(model)):
            folder = getattr(model, "name_or_path", "") or "the checkpoint"
            named = (*loading.planned.quantized, *loading.planned.experts)[0]
            raise ValueError(
                f"{folder} holds the weight of none of the layers to quantize, such as {named}; "
                "its tensors have other names or shapes than the model's"
            )
        loading.stacks.check_complete(model)
        new = [p for p in model.parameters() if not getattr(p, "_is_hf_initialized", False) and p.is_floating_point()]
        _add_adapters(model, loading.planned, self.config)
        adapted = any(layer.adapters for _, layer in adapted_layers(model))
        choose_what_is_trained(model, replace(loading.planned, trained=_dense_heads(model) if adapted else ()))
        for parameter in new:  # no checkpoint holds them
            parameter.requires_grad_(True)
        # The layers can be cast, and PEFT need not treat them otherwise than dense ones.
        model.is_quantized = False
        self._note(model)
        self._tell(model, loading)
        return model

    def _tell(self, model: nn.Module, loading: _Loading) -> None:
        """Fills the report and the list of dense parts, and logs them."""
        self.dense_bytes = _dense_bytes(model)
        if not self.pre_quantized:
            layers = dict(qlora_layers(model))
            new = {*loading.new_heads, *loading.planned.quantized}
            left_alone = {
                name: _NEW if name in new else loading.planned.left_alone[name]
                for name in (*loading.planned.left_alone, *loading.planned.quantized)
                if name not in layers
            }
            done = replace(loading.planned, quantized=tuple(layers), left_alone=left_alone)
            self.report = report(model, done, loading.bytes_before)
            logger.info("%s", self.report)
        parts = sorted(self.dense_bytes.items(), key=lambda part: -part[1])
        logger.info(
            "%.1f MiB stay dense: %s",
            sum(self.dense_bytes.values()) / 2**20,
            listed((f"{name} {size / 2**20:.1f} MiB" for name, size in parts), 5) or "nothing",
        )


class _Loading:
    """What is known while one model is loaded.

    Attributes:
        planned: what becomes of each layer.
        new_heads: layers outside the trunk that the checkpoint does not hold.
        files: the checkpoint's.
        places: where each layer is.
        waiting: layers whose dense weight has not come yet.
        stacks: a mixture's experts that have not come yet.
        shapes: of the dense model's parameters.
        misfits: weights that came with another shape, with the right one.
        error: the first weight's that could not be quantized.
        bytes_before: of the dense model.
    """

    def __init__(
        self, model: nn.Module, planned: Plan, new_heads: list[str], files: Sequence[str] | None, waiting: bool
    ) -> None:
        self.planned, self.new_heads, self.files = planned, new_heads, files
        self.places: dict[str, Places] = places_of(model, is_linear_like)
        self.waiting = set(planned.quantized) if waiting else set()
        self.stacks = Stacks(model, planned.experts if waiting else ())
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.misfits: dict[str, torch.Size] = {}
        self.error: Exception | None = None
        self.bytes_before = bytes_of(model)


def _tied(model: Any) -> list[str]:
    """Modules whose weights transformers will tie to others: while it loads, they are not tied yet."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    modules = {key.rpartition(".")[0] for key in (*keys, *keys.values())}
    return [name for name, module in model.named_modules() if name in modules and is_linear_like(module)]


def _dense_heads(model: nn.Module) -> tuple[str, ...]:
    """The heads of a task, which are trained with the adapters, as :func:`quantize_model` has it."""
    four_bit = dict(qlora_layers(model))
    return tuple(name for name in new_heads(model) if name not in four_bit)


def _mark_as_initialized(layer: QLinear) -> None:
    """Keeps transformers from filling the layer with random numbers: its ``weight`` is none that it could fill."""
    for module in layer.modules():
        module._is_hf_initialized = True  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def _add_adapters(model: nn.Module, planned: Plan, config: NF4Config) -> None:
    """
    Raises:
        ValueError: when the layers have adapters already, or no memory of their own (offloading).
    """
    layers = dict(adapted_layers(model))
    names = [name for name in (*planned.adapted, *planned.adapted_experts) if name in layers]
    for name in names:
        if layers[name].adapters:
            raise ValueError(
                f"the folder has adapters already, such as {next(iter(layers[name].adapters))!r} of {name}; load it "
                "without a rank"
            )
        if layers[name].weight_packed.is_meta:
            raise ValueError(f"{name} is offloaded and cannot have a new adapter; give a device_map without offloading")
    for name in names:
        layers[name].add_adapter(
            "default", config.rank, config.alpha, config.dropout, config.rslora, dtype=config.adapter_dtype
        )


def _dense_bytes(model: nn.Module) -> dict[str, int]:
    """The bytes of each module's own parameters where they are not 4-bit; shared ones count once."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    inside = {id(module) for _, layer in adapted_layers(model) for module in layer.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            sizes[name] = sum(p.numel() * p.element_size() for p in own)
    return sizes


AUTO_QUANTIZER_MAPPING[NF4Config.quant_method] = NF4Quantizer
