"""A mixture's experts on 4-bit weights: one stack of weights, and the module of transformers that uses two."""

# Uses private attributes of layers.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import require
from ..formats.nf4_stack import NF4Stack
from . import state_dict as loading
from .adapters.config import AdapterConfig
from .adapters.named import check_adapter_name, init_adapter, put_adapter
from .grouped import grouped_on


class QExperts(loading.CheckedLoading):
    """The weights [E, N, K] of E experts in 4-bit NormalFloat, frozen, with named low-rank adapters for each expert.

    It takes the place of a three-dimensional parameter, and its tensors are registered as QLinear's are: bytes as
    frozen Parameters (``weight_packed`` [E, ceil(N*K/2)], ``weight_absmax``), constants as buffers
    (``weight_nested_*``), adapters in ``lora_A.<name>`` [E, r, K] and ``lora_B.<name>`` [E, N, r]. Adapters have no
    dropout, as PEFT's for parameters have none, and are not merged.

    Args:
        weights: the stack.
        config: of the adapter "default"; rank 0 for none.
        dtype: of the dense parameter that this one stands for; the stack's by default.
        adapter_dtype: of the adapters, ``dtype`` by default; float32 keeps master copies.

    Raises:
        ValueError: for a rank that does not fit, alpha <= 0, or dropout.
    """

    num_experts: int

    def __init__(
        self,
        weights: NF4Stack,
        config: AdapterConfig | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        config = AdapterConfig(rank=0, alpha=1) if config is None else config
        self.num_experts, self.out_features, self.in_features = weights.shape
        config.check(self.out_features, self.in_features)
        self._shape, self._dtype, self._merged = weights.shape, dtype or weights.dtype, None
        self._set_pieces("weight", cast(Any, weights))
        self.bias = None
        self._set_up_adapters(config, adapter_dtype)

    @property
    def weight(self) -> NF4Stack:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The frozen weights [E, N, K]."""
        return NF4Stack(*self._pieces(), self._shape, self._dtype)

    def _operand(self) -> ops.Operand:
        return self.weight.operand()

    def _add_adapter(self, name: str, config: AdapterConfig, dtype: torch.dtype | None = None) -> None:
        require(config.dropout == 0, ValueError, f"adapters of experts have no dropout, found {config.dropout}; use 0")
        check_adapter_name(self, name)
        dtype, device = dtype or self._adapter_dtype or self._dtype, self.weight_packed.device
        A = torch.empty(self.num_experts, config.rank, self.in_features, dtype=dtype, device=device)
        B = torch.empty(self.num_experts, self.out_features, config.rank, dtype=dtype, device=device)
        for a, b in zip(A, B, strict=True):  # the fan-in is one expert's
            init_adapter(a, b)
        put_adapter(self, name, config, A, B)

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """[M, K] -> [M, N]: rows ``offsets[e]`` to ``offsets[e + 1]`` by expert e; see :func:`linear_grouped`."""
        name = self._active
        pieces = self._pieces()
        if name is None or self._disabled:
            return grouped_on(x, pieces, self._shape, offsets, bias, None, None, 1.0)
        A, B, scaling = self.lora_A[name], self.lora_B[name], self._adapters[name].scaling
        return grouped_on(x, pieces, self._shape, offsets, bias, A, B, scaling)

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.weight.bits_per_weight:.3f}, rank={self.rank}"
        )


class QExpertsModule(nn.Module):
    """transformers' module of a mixture's experts, with its three-dimensional weights replaced by :class:`QExperts`.

    It has that module's settings, activation, biases and gate, and the same names: ``gate_up_proj`` (or ``up_proj``)
    and ``down_proj``. What it computes is what all of transformers' implementations of experts do: rows are sorted by
    expert, and each of the two products is one operation for all experts.

    Args:
        experts: the module.
        stacks: what replaces its parameters, by their names.
    """

    num_experts: int
    has_bias: bool
    # Of later releases: transformers notes the first from 5.3 on, and the second only then.
    has_gate: bool = True
    has_post_expert_norm: bool = False
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __init__(self, experts: nn.Module, stacks: Mapping[str, QExperts]) -> None:
        super().__init__()
        plain = set(vars(nn.Module()))
        self.__dict__.update({name: value for name, value in vars(experts).items() if name not in plain})
        self._kind = type(experts)
        for name, parameter in experts._parameters.items():
            if name not in stacks:
                self.register_parameter(name, parameter)
        for name, buffer in experts._buffers.items():
            self.register_buffer(name, buffer, name not in experts._non_persistent_buffers_set)
        # In the order of the parameters, which names PEFT's adapters in files.
        order = list(experts._parameters)
        ordered = sorted(stacks.items(), key=lambda each: order.index(each[0]) if each[0] in order else len(order))
        for name, module in (*experts._modules.items(), *ordered):
            self.add_module(name, module)
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], the experts of each token; others than the module's, as transformers uses for
                tokens that are another device's, contribute nothing.
            top_k_weights: [tokens, k], their shares.

        Returns:
            [tokens, hidden], each token's experts weighted and added up.
        """
        tokens, top_k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        elsewhere = chosen >= self.num_experts
        shares = top_k_weights.reshape(-1).masked_fill(elsewhere, 0)
        chosen, order = chosen.clamp(max=self.num_experts - 1).sort(stable=True)
        ends = torch.arange(self.num_experts + 1, device=chosen.device, dtype=chosen.dtype)
        offsets = torch.searchsorted(chosen, ends)
        x = hidden_states[order.div(top_k, rounding_mode="floor")]
        y = self._experts(x, offsets)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        y = y[back] * shares.unsqueeze(-1)
        return y.view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)

    def _experts(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Each row of x by its expert."""
        first, second = "gate_up_proj" if self.has_gate else "up_proj", "down_proj"
        hidden = getattr(self, first)(x, offsets, self._bias(first))
        hidden = cast(Any, self._kind)._apply_gate(self, hidden) if self.has_gate else self.act_fn(hidden)
        y = getattr(self, second)(hidden, offsets, self._bias(second))
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def _bias(self, name: str) -> Tensor | None:
        return getattr(self, f"{name}_bias") if self.has_bias else None
