"""Layers that a QLinear can stand for: nn.Linear, and transformers' Conv1D, which keeps its weight transposed."""

from __future__ import annotations

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, x W + b with a weight [in, out]: the linear layer of GPT-2."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear_like(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix, of a kind that can be quantized or not."""
    kind = type(module)
    other = kind.__module__.startswith(("transformers.", "bitsandbytes.")) and kind.__name__ == "Linear8bitLt"
    return isinstance(module, nn.Linear) or is_conv1d(module) or other


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a dense layer, whichever way its weight lies."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def as_linear(module: nn.Module) -> nn.Linear:
    """A dense layer as an nn.Linear: itself, or for a Conv1D one whose weight is a transposed view, not contiguous."""
    if isinstance(module, nn.Linear):
        return module
    out_features, in_features = matrix_shape(module)
    bias = module._parameters.get("bias")
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    weight = module.get_parameter("weight")
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear.train(module.training)
