"""PagedAdamW and PagedLion."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

from .arena.layout import FIRST, FIRST_ABSMAX, SECOND, SECOND_ABSMAX
from .options import Options
from .paged import Paged
from .schema import Algorithm, Moment

_FIRST_MOMENT = Moment("exp_avg", FIRST, FIRST_ABSMAX)
ADAMW = Algorithm(0, (_FIRST_MOMENT, Moment("exp_avg_sq", SECOND, SECOND_ABSMAX)))
LION = Algorithm(1, (_FIRST_MOMENT,))


class PagedAdamW(Paged):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with paged states, in one launch for all parameters.

    It computes what torch.optim.AdamW computes, with every operation in float32 and rounded once. Parameters are
    float32, bfloat16 or float16, all on one device, with gradients of the same dtype. They may be DTensors, such as
    FSDP2's, sharded in any way or replicated. Ordinary parameters beside them count as the same in all processes.

    On a CUDA device the states lie in managed memory. They move to the host when the card's memory is needed; those
    beyond ``page_budget`` visit the device during a step only. On the CPU the states lie in memory, or in a file with
    ``page_file``.

    Args:
        params: parameters, named parameters or groups, as for torch.optim.
        lr: learning rate; a number, or a tensor with one element.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: a step shrinks parameters by lr * weight_decay.
        state_bits: 32 for float32 moments. 8 for one byte each, in blocks of 256 with a float32 constant (Dettmers et
            al. 2021, arXiv 2110.02861): a quarter of the memory.
        max_grad_norm: clips the norm of all gradients, as ``torch.nn.utils.clip_grad_norm_`` does, within the step.
        page_budget: the most bytes of states on the CUDA device at a time. None: all of them, or half of the card's
            free memory when the arena is made, if that is less.
        master_weights: keeps a float32 copy of 16-bit parameters in the arena, which the step updates. Values that
            others write to a parameter are taken over.
        skip_nonfinite: skips a step whose gradients hold NaN or infinity; see ``skipped_steps``.
        page_file: on the CPU, a folder for a file that holds the states and that the system pages, for states larger
            than memory. The folder needs room for all of them. Has no effect on a CUDA device.

    Raises:
        ValueError: for settings out of range, or parameters on several devices or in two groups.
        TypeError: for parameters without kernels (float64, complex, sparse), and for Partial DTensors.
        NotImplementedError: for max_grad_norm or skip_nonfinite with DTensors on a CUDA device.
    """

    _algorithm = ADAMW

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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options = Options(
            state_bits=state_bits,
            max_grad_norm=max_grad_norm,
            page_budget=page_budget,
            master_weights=master_weights,
            skip_nonfinite=skip_nonfinite,
            page_file=page_file,
        )
        super().__init__(params, defaults, options)


class PagedLion(Paged):
    """Lion (Chen et al. 2023, arXiv 2302.06675) with paged states: one moment, and steps of ``lr`` up or down.

    Args:
        params, state_bits, max_grad_norm, page_budget, master_weights, skip_nonfinite, page_file: see PagedAdamW.
        lr: learning rate, about a tenth of AdamW's.
        betas: decay rates in the update and of the moment.
        weight_decay: decoupled; about ten times AdamW's.
    """

    _algorithm = LION

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
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        options = Options(
            state_bits=state_bits,
            max_grad_norm=max_grad_norm,
            page_budget=page_budget,
            master_weights=master_weights,
            skip_nonfinite=skip_nonfinite,
            page_file=page_file,
        )
        super().__init__(params, defaults, options)
