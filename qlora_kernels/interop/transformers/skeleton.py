"""Models of transformers without memory for their weights: to look at their layers, or to load into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import InputError


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword for a model's dtype: transformers renamed ``torch_dtype`` to ``dtype`` in 4.56."""
    import transformers

    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


# More than any model has: one of 10,000 layers.
_MOST_PARAMETERS = 200_000


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A context in which modules are created with their parameters on the meta device, but with real buffers.

    Buffers that a checkpoint does not hold (the frequencies of rotary embeddings) are computed when a module is
    created; on the meta device they would be lost.

    Raises:
        InputError: when there are so many that a config must be wrong.
    """
    register = nn.Module.register_parameter
    left = _MOST_PARAMETERS

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError(f"its config.json asks for more than {_MOST_PARAMETERS:,} parameters")
        # One that is already on meta may be tied to another: it must stay the same object.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def load_config(folder: str) -> Any:
    """transformers' config of a model in a folder, or of one with an id. Code that comes with it is never run."""
    from transformers import AutoConfig

    # Without the argument, transformers asks on the terminal.
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def skeleton(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model with its parameters on the meta device.

    Args:
        config: a transformers config; a ``quantization_config`` in it is ignored.
        dtype: of the parameters; by default the config's.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    if dtype is None:
        dtype = config_dtype(config)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **dtype_argument(dtype))
    model.tie_weights()
    return model.eval()


def config_dtype(config: Any) -> torch.dtype:
    """The dtype that a config names, or float32."""
    # Where the new name exists, reading the old one prints a warning.
    dtype = getattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", None) or torch.float32
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"the config's dtype should be the name of a floating type, found {dtype}")
    return dtype


def skipped(model: nn.Module) -> list[str]:
    """The layers to leave dense: the output embedding, whatever its name."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    return ["lm_head", *(name for name, module in model.named_modules() if module is head and name != "lm_head")]


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
