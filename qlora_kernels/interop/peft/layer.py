"""PEFT's LoRA layer on a QLinear base: one fused product for a plain adapter, PEFT's own terms for the rest."""

# Uses private attributes of layers.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn

from ...formats.nf4 import NF4Weight
from ...layers.functional import linear_on
from ...layers.merging import dense_layer, requantize
from ...layers.qlinear import QLinear, fitted
from ...ops import LoraTerm

_NOT_INITIALIZED = (
    "{} computes its adapters from the dense weight, and this layer is 4-bit already. Initialize them on the dense "
    "model, save its base (get_base_model()) and the adapter, quantize that base with rank=0 and load the adapter onto "
    "it; or use init_lora_weights=True"
)


def make_layer(target: nn.Module, adapter_name: str, **options: Any) -> LoraQLinear:
    """The layer for a target whose base is a QLinear, from what PEFT passes to dispatch_default."""
    options.pop("parameter_name", None)
    config: Any = options["config"] if "config" in options else options["lora_config"]
    if config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is set to True but the target is a QLinear; setting it to False", stacklevel=2)
        config.fan_in_fan_out = False
    if "lora_config" in options:  # in older versions of PEFT a layer took the settings one by one
        options.pop("lora_config")
        options["fan_in_fan_out"] = False
    return LoraQLinear(target, adapter_name, **options)


def _is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is its class's forward and nothing else: no hook, no forward of its own."""
    state = module.__dict__
    return (
        type(module).forward is kind.forward
        and "forward" not in state
        and not (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        )
    )


def _is_plain_dropout(module: nn.Module | None) -> bool:
    """Whether the fused operation can stand for it, which scales by 1 / (1 - p): everything dropped is PEFT's way."""
    if isinstance(module, nn.Dropout):
        return module.p < 1.0 and _is_bare(module, nn.Dropout)
    return isinstance(module, nn.Identity) and _is_bare(module, nn.Identity)


class LoraQLinear(LoraLinear):
    """LoRA on a 4-bit base, as PEFT's own layer in everything but this:

    - With one plain adapter active, forward is one operation. With several, the first is fused and the others are
      added as PEFT does. DoRA, biases of adapters, mixed batches and other variants take PEFT's way.
    - :meth:`merge` requantizes the base, once for all merged adapters; :meth:`unmerge` puts the bits back.
    - PiSSA and OLoRA requantize the base without the part that became the adapter.
    """

    _stand_ins: list[nn.Linear]  # the dense layer that PEFT's code computes on instead of the base, if it does
    _before_merge: tuple[NF4Weight, Tensor | None] | None  # weight and bias of the base while adapters are merged

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        # PEFT's constructor initializes the adapter, which needs these. They are no modules: a list hides them.
        self._stand_ins, self._before_merge = [], None
        super().__init__(base_layer, adapter_name, **options)

    def get_base_layer(self) -> nn.Module:
        return self._stand_ins[-1] if self._stand_ins else super().get_base_layer()

    # ------------------------------------------------------------------------------------------------- the product

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., K] -> [..., N]; takes what PEFT's layer takes."""
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        lora_A = self.lora_A._modules
        names = [name for name in self.active_adapters if name in lora_A]
        if not names or any(name in self.lora_variant for name in names) or not self._can_be_fused(names[0]):
            return super().forward(x)
        result = self._fused(x, names[0])
        if len(names) == 1:
            return result
        dtype = result.dtype
        for name in names[1:]:
            A, B = self.lora_A[name], self.lora_B[name]
            inputs = self.lora_dropout[name](self._cast_input_dtype(x, cast(Any, A).weight.dtype))
            result = result + B(A(inputs)) * self.scaling[name]
        return result.to(dtype)

    def _can_be_fused(self, name: str) -> bool:
        """Whether the base and an adapter's modules are plain, so that one product is the same as calling each."""
        base, A, B = self.base_layer, self.lora_A._modules[name], self.lora_B._modules[name]
        dropout = self.lora_dropout._modules[name]
        return (
            isinstance(base, QLinear)
            and base._active is None
            and _is_bare(base, QLinear)
            and _is_bare(cast(nn.Module, A), nn.Linear)
            and _is_bare(cast(nn.Module, B), nn.Linear)
            and cast(Any, A).bias is None
            and cast(Any, B).bias is None
            and _is_plain_dropout(dropout)
        )

    def _fused(self, x: Tensor, name: str) -> Tensor:
        base: Any = self.base_layer
        dtype, scaling, dropout = x.dtype, self.scaling[name], self.lora_dropout[name]
        A, B = cast(Any, self.lora_A[name]).weight, cast(Any, self.lora_B[name]).weight
        if isinstance(scaling, Tensor):  # as prepare_model_for_compiled_hotswap makes it
            B, scaling = B * scaling.to(B.dtype), 1.0
        term = LoraTerm(
            fitted("lora_A", A, dtype),
            fitted("lora_B", B, dtype),
            scaling,
            dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
        )
        bias = base.bias
        return linear_on(x, base._operand(), None if bias is None else fitted("bias", bias, dtype), term)

    # ------------------------------------------------------------------------------------------------- merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds adapters into the base, which stays 4-bit: it is requantized, with PEFT's warning for 4-bit layers.

        The base that they are added to is always the original one, so several merges round only once.

        Args:
            safe_merge: accepted for PEFT's sake; a merge that fails never changes anything.
            adapter_names: which; the active ones by default.

        Raises:
            ValueError: when the merged weight holds NaN or infinity. Nothing has changed.
            RuntimeError: for an adapter with a bias when the base has none.
        """
        if self._stand_ins:  # PEFT's code, merging on a dense layer
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        warnings.warn(
            "Merging LoRA into a 4-bit layer requantizes it: outputs may differ by rounding errors.", stacklevel=2
        )
        base: Any = self.get_base_layer()
        before, merged = self._before_merge, self.merged_adapters
        if before is None:
            before = (base.weight, None if base.bias is None else base.bias.detach().clone())
        self.merged_adapters = []
        try:
            dense = dense_layer(before[0].to(base.weight_packed.device), before[1])
            with self._standing_in(dense):
                super().merge(safe_merge, merged + names)
            after = _requantized(before[0], dense.weight, "; ".join(merged + names))
        except BaseException:
            self.merged_adapters = merged
            raise
        finally:
            self._caches.clear()  # norms of the weight, which PEFT needs to unmerge by computing
        self._before_merge = before
        self._put(after, dense.bias)

    def unmerge(self) -> None:
        """Takes all merged adapters out again: the base is what it was, bit for bit."""
        if self._stand_ins or not self.merged_adapters:
            super().unmerge()
            return
        assert self._before_merge is not None  # merge() sets it with merged_adapters
        weight, bias = self._before_merge
        self._put(weight.to(cast(Any, self.get_base_layer()).weight_packed.device), bias)
        self._before_merge = None
        self.merged_adapters = []

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense nn.Linear, in the base's dtype, with the merged or else the active adapters folded in.

        Nothing is requantized: where adapters are merged, they are added to the original base.
        """
        base: Any = self.get_base_layer()
        weight, bias = self._before_merge or (base.weight, base.bias)
        merged = self.merged_adapters
        dense = dense_layer(weight.to(base.weight_packed.device), bias)
        self.merged_adapters = []
        try:
            with self._standing_in(dense):
                super().merge(False, merged or None)
        finally:
            self.merged_adapters = merged
            self._caches.clear()
        return dense.to(base.dtype).train(base.training)

    # ------------------------------------------------------------------------------------------------- initialization

    def resolve_lora_variant(self, **settings: Any) -> Any:
        if getattr(settings.get("config"), "kasa_config", None) is not None:
            raise ValueError(_NOT_INITIALIZED.format("KaSA"))
        return super().resolve_lora_variant(**settings)

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        with self._requantizing("PiSSA"):
            super().pissa_init(adapter_name, init_lora_weights)

    def olora_init(self, adapter_name: str) -> None:
        with self._requantizing("OLoRA"):
            super().olora_init(adapter_name)

    def mica_init(self, adapter_name: str) -> None:
        with self._standing_in(self._dense("MiCA")):
            super().mica_init(adapter_name)

    def corda_init(self, adapter_name: str, init_lora_weights: str) -> None:
        raise ValueError(_NOT_INITIALIZED.format("CorDA"))

    def loftq_init(self, adapter_name: str, *settings: Any) -> None:
        raise ValueError(_NOT_INITIALIZED.format("LoftQ"))

    def lora_ga_init(self, adapter_name: str, lora_ga_config: Any) -> None:
        if hasattr(self.get_base_layer(), "_peft_loraga_grad"):
            raise ValueError(_NOT_INITIALIZED.format("LoRA-GA"))
        super().lora_ga_init(adapter_name, lora_ga_config)

    # ------------------------------------------------------------------------------------------------- the stand-in

    @contextlib.contextmanager
    def _standing_in(self, dense: nn.Linear) -> Iterator[None]:
        """Within it PEFT's code finds a dense layer where the base is."""
        self._stand_ins.append(dense)
        try:
            yield
        finally:
            self._stand_ins.pop()

    @skip_init_on_device  # while it loads with low_cpu_mem_usage, PEFT has every new parameter put on meta
    def _dense(self, what: str) -> nn.Linear:
        base: Any = self.get_base_layer()
        if base.weight.is_meta:
            raise RuntimeError(f"{what} needs the base weight, but the layer is on the meta device; load it first")
        return dense_layer(base.weight, base.bias)

    @contextlib.contextmanager
    def _requantizing(self, what: str) -> Iterator[None]:
        """Within it PEFT's code changes a dense weight, from which the base is then quantized again."""
        dense = self._dense(what)
        with self._standing_in(dense):
            yield
        before = cast(Any, self.get_base_layer()).weight
        warnings.warn(
            f"{what} takes its adapters from the 4-bit weight and requantizes the rest: outputs change by rounding "
            "errors",
            stacklevel=5,
        )
        self._put(_requantized(before, dense.weight, what), None)

    @skip_init_on_device
    def _put(self, weight: NF4Weight, bias: Tensor | None) -> None:
        """Gives the base another weight and, if one is given, other values of its bias."""
        base: Any = self.get_base_layer()
        base._set_pieces("weight", weight)
        if bias is not None:
            with torch.no_grad():
                base.bias.copy_(bias)


def _requantized(before: NF4Weight, dense: Tensor, what: str) -> NF4Weight:
    if not torch.isfinite(dense).all():
        raise ValueError(
            f"NaN or infinity in the merged weight: the adapter {what} seems to be broken. Nothing has changed"
        )
    return requantize(before, lambda begin, end: dense.detach()[begin:end].to(torch.float32), "the merged weight")
