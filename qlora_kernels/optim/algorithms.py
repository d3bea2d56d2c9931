"""PagedAdamW and PagedLion: optimizers whose states lie in one arena that is paged between the device and the host."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

from .arena.layout import FIRST, FIRST_ABSMAX, SECOND, SECOND_ABSMAX
from .paged import Paged


class PagedAdamW(Paged):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with paged states, in one launch for all parameters.

    The numbers are those of torch.optim.AdamW, every operation in float32 and rounded once. Parameters are float32,
    bfloat16 or float16, all on one device, with gradients of the same dtype. They may be DTensors, such as FSDP2's:
    sharded in any way, or replicated. Ordinary parameters beside them count as the same in all processes.

    On a CUDA device the states lie in managed memory: they go to the host when the card's memory is needed, and beyond
    ``page_budget`` by themselves. On the CPU they lie in the host's memory, or in a file with ``page_file``.

    Args:
        params: parameters, named parameters or groups, as for torch.optim.
        lr: learning rate; a number, or a tensor of one.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: parameters shrink by lr * weight_decay a step.
        state_bits: 32: float32 moments; 8: one byte each, in blocks of 256 with a float32 constant (Dettmers et al.
            2021, arXiv 2110.02861), a quarter of the memory.
        max_grad_norm: clip the norm of all gradients to this, as ``torch.nn.utils.clip_grad_norm_`` does, within the
            step.
        page_budget: most bytes of states on the CUDA device at a time; None: all, or half of what the card has free
            when the arena is made, where that is less.
        master_weights: keep a float32 copy of 16-bit parameters in the arena, which the step works on. What is written
            to a parameter from outside counts.
        skip_nonfinite: leave out a step whose gradients hold NaN or infinity; see ``skipped_steps``.
        page_file: on the CPU, a folder in which a file holds the states, paged by the system: for states larger than
            memory. Needs as much room there as the states take. On a CUDA device it has no effect.

    Raises:
        ValueError: for settings out of range, parameters of several devices, or in two groups.
        TypeError: for parameters without kernels (float64, complex, sparse), and terms of a sum (Partial DTensors).
        NotImplementedError: for max_grad_norm or skip_nonfinite with DTensors on a CUDA device.
    """

    _algorithm = 0
    _moments = (("exp_avg", FIRST, FIRST_ABSMAX), ("exp_avg_sq", SECOND, SECOND_ABSMAX))

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        max_grad_norm: float | None = None,
        page_budget: int | None = None,
        master_weights: bool = False,
        skip_nonfinite: bool = False,
        page_file: str | os.PathLike | None = None,
    ):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            state_bits=state_bits,
            max_grad_norm=max_grad_norm,
            page_budget=page_budget,
            master_weights=master_weights,
            skip_nonfinite=skip_nonfinite,
            page_file=page_file,
        )


class PagedLion(Paged):
    """Lion (Chen et al. 2023, arXiv 2302.06675) with paged states: one moment, and steps of ``lr`` either way.

    Args:
        params, state_bits, max_grad_norm, page_budget, master_weights, skip_nonfinite, page_file: see PagedAdamW.
        lr: learning rate, about a tenth of AdamW's.
        betas: of the update, and of the moment.
        weight_decay: decoupled, about ten times AdamW's.
    """

    _algorithm = 1
    _moments = (("exp_avg", FIRST, FIRST_ABSMAX),)

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        max_grad_norm: float | None = None,
        page_budget: int | None = None,
        master_weights: bool = False,
        skip_nonfinite: bool = False,
        page_file: str | os.PathLike | None = None,
    ):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            state_bits=state_bits,
            max_grad_norm=max_grad_norm,
            page_budget=page_budget,
            master_weights=master_weights,
            skip_nonfinite=skip_nonfinite,
            page_file=page_file,
        )
