"""Models of transformers without memory for their weights: to look at their layers, or to load into."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import InputError
from ...models.heads import heads


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword for a model's dtype: transformers renamed ``torch_dtype`` to ``dtype`` in 4.56."""
    import transformers

    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


# More than any model has: one of 10,000 layers.
_MOST_PARAMETERS = 200_000

# Tensors of more elements are made without memory, since a config can ask for any size. No buffer that is computed
# when a module is created is larger: the largest are masks of 8,192 times 8,192 positions.
_LARGEST_WITH_MEMORY = 1 << 26
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class _LargeOnMeta(TorchFunctionMode):
    """A context in which large tensors are created on the meta device: parameters, before they could be moved there.

    Raises:
        InputError: for a large tensor of numbers in order, which no parameter is; others are computed from it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None and _count(func, args, kwargs) > _LARGEST_WITH_MEMORY:
            kwargs["device"] = "meta"
        if func is torch.arange and all(isinstance(number, (int, float)) for number in args):
            start, end, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3] if args else (0, 0, 1)
            if abs(end - start) > _LARGEST_WITH_MEMORY * abs(step):
                raise _too_large(abs(end - start) // (abs(step) or 1))
        return func(*args, **kwargs)


def _count(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many elements a call asks for."""
    size = args if args else (kwargs.get("size", ()),)
    if func is torch.full or isinstance(size[0], (tuple, list)):
        size = size[0]
    return math.prod(length for length in size if isinstance(length, int))


def _too_large(count: float) -> InputError:
    return InputError(f"its config.json asks for tensors of {count:.2g} elements that no file holds")


@contextlib.contextmanager
def _parameters_on_meta(most: int | None = None) -> Iterator[None]:
    """A context in which modules are created with their parameters on the meta device, but with real buffers.

    Large tensors never have memory, not even for a moment.

    Buffers that a checkpoint does not hold (the frequencies of rotary embeddings) are computed when a module is
    created; on the meta device they would be lost.

    Raises:
        InputError: when there are so many, or such large buffers, that a config must be wrong.
    """
    register, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer
    most = _MOST_PARAMETERS if most is None else min(most, _MOST_PARAMETERS)
    left = most

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError(f"its config.json asks for more than {most:,} parameters")
        # One that is already on meta may be tied to another: it must stay the same object.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    def register_with_memory(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and tensor.is_meta and not persistent:
            raise _too_large(tensor.numel())
        register_buffer(self, name, tensor, persistent)

    nn.Module.register_parameter, nn.Module.register_buffer = register_on_meta, register_with_memory
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = register, register_buffer


def load_config(folder: str) -> Any:
    """transformers' config of a model in a folder, or of one with an id. Code that comes with it is never run."""
    from transformers import AutoConfig

    # Without the argument, transformers asks on the terminal.
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def skeleton(config: Any, dtype: torch.dtype | None = None, most: int | None = None) -> nn.Module:
    """A model with its parameters on the meta device: of the class that its config names, or a causal language model.

    Args:
        config: a transformers config; a ``quantization_config`` in it is ignored.
        dtype: of the parameters; by default the config's.
        most: how many parameters it may have, if that is known.
    """
    if getattr(config, "quantization_config", None) is not None:
        config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    if dtype is None:
        dtype = config_dtype(config)
    with _parameters_on_meta(most):
        model = _new_model(config, dtype_argument(dtype))
    model.tie_weights()
    return model.eval()


def _new_model(config: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    kind = named_class(config)
    if kind is None:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    return kind._from_config(config, **options)


def named_class(config: Any) -> Any:
    """The class of transformers that a config's ``architectures`` names first, or None."""
    import transformers

    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or not name.isidentifier():
        return None
    try:
        kind = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # for a model that needs another package
        return None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    return kind if kind.config_class is not None and isinstance(config, kind.config_class) else None


def is_causal(config: Any) -> bool:
    """Whether a config's model predicts the next token, as far as ``architectures`` says."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = named_class(config)
    if kind is None:
        return True
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in (names,) if isinstance(name, str)}
    return kind.__name__ in known or kind.__name__.endswith(("CausalLM", "LMHeadModel", "ForConditionalGeneration"))


def config_dtype(config: Any) -> torch.dtype:
    """The dtype that a config names, or float32."""
    # Where the new name exists, reading the old one prints a warning.
    dtype = getattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", None) or torch.float32
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"the config's dtype should be the name of a floating type, found {dtype}")
    return dtype


def skipped(model: nn.Module) -> list[str]:
    """The layers to leave dense: the output embedding, whatever its name, and heads on top of the trunk."""
    return ["lm_head", *(name for name in heads(model) if name != "lm_head")]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts floating-point parameters in place, but no buffers: rotary frequencies stay float32."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model


def recompute_activations(model: nn.Module, enable: bool) -> None:
    """Switches activation checkpointing on or off; transformers 5 renamed its methods."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{kind}_checkpointing_enable")(**options)
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def same_parameter(model: nn.Module, first: str, second: str) -> bool:
    """Whether two names stand for one parameter."""

    def parameter(key: str) -> nn.Parameter | None:
        path, _, name = key.rpartition(".")
        return model.get_submodule(path)._parameters.get(name)

    return parameter(first) is not None and parameter(first) is parameter(second)
