"""QLinear: a linear layer on a frozen 4-bit weight with named low-rank adapters, in place of nn.Linear."""

# Users' arguments are checked whatever their annotations say.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import peft_names, require
from ..formats.nf4 import NF4Weight, check_range, meta_weight, quantize
from ..ops import LoraTerm, dispatcher
from . import state_dict as loading
from .adapters.config import AdapterConfig
from .adapters.named import init_adapter
from .functional import linear_on
from .merging import MergeReport, merge, to_linear, unmerge
from .offloading import offloaded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# nn.Linear's weight is a tensor, and its forward calls x "input".
class QLinear(loading.CheckedLoading, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """y = x W^T + bias + scaling * (dropout(x) A^T) B^T with W in 4-bit NormalFloat, frozen.

    Passes for an nn.Linear (``isinstance``, ``in_features``, ``out_features``, ``bias``), but has no dense weight:
    :attr:`weight` is an :class:`NF4Weight`. Bytes are frozen Parameters (``weight_packed``, ``weight_absmax``), which
    FSDP2 shards as they are; float32 constants are buffers (``weight_nested_*``), which neither ``.half()`` nor a
    mixed-precision policy casts. Adapters lie in ``lora_A.<name>`` [r, K] and ``lora_B.<name>`` [N, r]; the first is
    called "default". A starts Kaiming-uniform and B zero, so at the start the output is the base's.

    Ranks, alphas and dropouts are, like all hyperparameters in torch, not part of the state dict.

    Args:
        in_features: K, the columns of the weight.
        out_features: N, its rows.
        bias: whether to add a bias [N].
        rank: r of the adapter "default", 0 for none.
        alpha: its scaling is alpha / rank, or alpha / sqrt(rank) with ``rslora``.
        dropout: in [0, 1), on the adapter's path and in training mode only.
        rslora: see ``alpha``.
        double_quant: 4.127 bits per weight rather than 4.5.
        adapter_dtype: dtype of the adapters, ``dtype`` by default; float32 keeps master copies.
        device: where to make it; on "meta" only shapes are made.
        dtype: dtype of bias and adapters and of the dense layer that this one stands for; torch's default dtype
            unless given.

    Raises:
        ValueError: for a size that is not positive, a rank that is negative or larger than the layer, alpha <= 0,
            dropout outside [0, 1).
        TypeError: for a dtype other than float32, bfloat16, float16 and float64.
    """

    @peft_names
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        double_quant: bool = True,
        adapter_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            require(size > 0, ValueError, f"{name} should be positive, found {size}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        AdapterConfig(rank, alpha, dropout, rslora).check(out_features, in_features)
        self._set_up(
            meta_weight(out_features, in_features, double_quant),
            torch.empty(out_features, dtype=dtype, device="meta") if bias else None,
            AdapterConfig(rank, alpha, dropout, rslora),
            dtype,
            adapter_dtype,
        )
        device = torch.empty(0).device if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    def _set_up(
        self,
        weight: NF4Weight,
        bias: Tensor | None,
        config: AdapterConfig,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        for name, value in (("dtype", dtype), ("adapter_dtype", adapter_dtype or dtype)):
            require(value in _DTYPES, TypeError, f"{name} should be one of {', '.join(map(str, _DTYPES))}: {value}")
        n, k = weight.shape
        config.check(n, k)
        nn.Module.__init__(self)
        self._set_up_weight(weight, dtype)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self._set_up_adapters(config, adapter_dtype)

    @classmethod
    @peft_names
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        name: str = "weight",
    ) -> QLinear:
        """Quantizes a dense layer; bias, device and training mode carry over.

        Args:
            linear: an nn.Linear with a finite weight in float32, bfloat16 or float16.
            rank, alpha, dropout, rslora, double_quant, adapter_dtype: as for :class:`QLinear`.
            dtype: of bias and adapters; the weight's by default.
            name: what to call the weight in errors.

        Raises:
            TypeError: when ``linear`` is not a dense nn.Linear, its dtype cannot be quantized, or its bias is complex.
            ValueError: for a weight with NaN or infinity, or with values so near the largest of its type that double
                quantization rounds them to infinity, and as for :class:`QLinear`.
        """
        if isinstance(linear, QLinear) or not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes a dense nn.Linear, found {type(linear).__name__}")
        weight = linear.weight
        n, k = weight.shape
        AdapterConfig(rank, alpha, dropout, rslora).check(n, k)
        if weight.is_meta:
            quantized = meta_weight(n, k, double_quant)
        else:
            quantized = quantize(weight, double_quant, name=name)
            check_range(quantized, name)
        return cls.from_nf4(
            quantized,
            linear.bias,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            dtype=weight.dtype if dtype is None else dtype,
            adapter_dtype=adapter_dtype,
        ).train(linear.training)

    @classmethod
    @peft_names
    def from_nf4(
        cls,
        weight: NF4Weight,
        bias: Tensor | None = None,
        *,
        rank: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> QLinear:
        """A layer on a weight [N, K] that is quantized already; ``bias`` is copied, its ``requires_grad`` kept.

        Raises:
            TypeError: for a complex bias, of which only the real part would remain.
        """
        if bias is not None:
            require(not bias.is_complex(), TypeError, f"bias should be real, found {bias.dtype}")
        layer = cls.__new__(cls)
        dtype = weight.dtype if dtype is None else dtype
        dispatcher.require_memory("bias", bias)
        copy = None if bias is None else bias.detach().to(dtype=dtype, device=weight.device, copy=True)
        layer._set_up(weight, copy, AdapterConfig(rank, alpha, dropout, rslora), dtype, adapter_dtype)
        if bias is not None and layer.bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        return layer

    def reset_parameters(self) -> None:
        """A new random base as nn.Linear's (Kaiming-uniform), quantized; bias and adapters as at the start."""
        require(self._merged is None, RuntimeError, f"adapter '{self._merged}' is merged; call unmerge() first")
        device = self.weight_packed.device
        double_quant = self.weight.double_quant
        if device.type == "meta":
            return
        dispatcher.require_memory("bias", self.bias)
        for kind, matrices in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            for name, matrix in matrices.items():
                dispatcher.require_memory(f"{kind}.{name}", matrix)
        # float64 is a type to compute in, not one to quantize from.
        dtype = torch.float32 if self._dtype == torch.float64 else self._dtype
        dense = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        self._set_pieces("weight", quantize(dense, double_quant))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        for name in self._adapters:
            init_adapter(self.lora_A[name], self.lora_B[name])

    # ------------------------------------------------------------------------------------------------- the product

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[..., K] -> [..., N] in x's dtype, or autocast's, as nn.Linear; bias and adapters may have another dtype."""
        if "_hf_hook" in self.__dict__:
            with offloaded(self.lora_A, self.lora_B):
                return self._forward(x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        # Read past __getattr__ where nothing has taken a parameter's place: its searches cost as much as the rest.
        parameters, modules, dtype = self._parameters, self.__dict__["_modules"], x.dtype
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if bias is not None:
            bias = fitted("bias", bias, dtype)
        name, weight = self._active, self._operand()
        if name is None or self._disabled or self._merged is not None:
            return linear_on(x, weight, bias)
        config = self._adapters[name]
        A, B = modules["lora_A"]._parameters.get(name), modules["lora_B"]._parameters.get(name)
        lora = LoraTerm(
            fitted("lora_A", self.lora_A[name] if A is None else A, dtype),
            fitted("lora_B", self.lora_B[name] if B is None else B, dtype),
            config.scaling,
            config.dropout if self.training else 0.0,
        )
        return linear_on(x, weight, bias, lora)

    # ------------------------------------------------------------------------------------------------- merging

    def merge(self, probe: Tensor | None = None) -> MergeReport:
        """Folds the active adapter into the base, which stays 4-bit; the bits it had are kept for :meth:`unmerge`.

        Args:
            probe: [..., K], a batch to measure on.

        Returns:
            How far requantization moved the weight, and the outputs on ``probe``.

        Raises:
            RuntimeError: when one is merged already, none is active, adapters are disabled, or the layer is on the
                meta device.
            ValueError: when the adapter is not finite.
        """
        return merge(self, probe)

    def unmerge(self) -> None:
        """Takes the merged adapter out again: the base is what it was, bit for bit.

        Raises:
            RuntimeError: when none is merged.
        """
        unmerge(self)

    def to_linear(self) -> nn.Linear:
        """The dense nn.Linear, in :attr:`dtype`, that computes what this layer does now, adapter folded in."""
        return to_linear(self)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.weight.bits_per_weight:.3f}, rank={self.rank}"
        )
        if self._active is not None:
            config = self._adapters[self._active]
            text += f", alpha={config.alpha}, dropout={config.dropout}, adapter={self._active!r}"
        return text + (f", merged={self._merged!r}" if self._merged is not None else "")


def fitted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias or adapter as the kernels take it: in x's dtype or in float32."""
    own = tensor.dtype
    return tensor if own is dtype or own is torch.float32 else dispatcher.convert(name, tensor, dtype)
