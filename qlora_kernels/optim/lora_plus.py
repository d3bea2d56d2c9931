"""LoRA+: a larger learning rate for B than for A."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..errors import require

# The dictionaries in which this package's layers and PEFT's keep their matrices B.
_B = ("lora_B", "lora_embedding_B")


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0, **settings: Any) -> list[dict[str, Any]]:
    """Groups of parameters for any optimizer: B of every adapter learns ``ratio`` times as fast as A.

    ``PagedAdamW(lora_plus_groups(model, lr=1e-4))``. A starts at random and B at zero, and in wide layers one rate
    serves B badly (Hayou et al. 2024, LoRA+, sections 3 and 4, https://arxiv.org/abs/2402.12354). The paper's ratio is
    16, with a rate of A of about half of what serves both. Adapters of this package's layers and PEFT's are found.

    Args:
        model: a model with adapters.
        lr: of A, and of all else that asks for gradients, such as heads.
        ratio: of the rates, lr of B over lr of A; 1 for plain LoRA.
        settings: others of both groups, such as weight_decay.

    Returns:
        Two groups, in the order of ``model.parameters()``: B last. The first is left out when only B asks for
        gradients.

    Raises:
        ValueError: when no B asks for gradients, for a rate that is negative or not finite, and for a ratio that is not
            positive and finite.
        TypeError: when they are not numbers.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number, TypeError, f"{name} should be a number, found {value!r:.100}")
    require(math.isfinite(lr) and lr >= 0, ValueError, f"lr should be finite and not negative, found {lr}")
    require(math.isfinite(ratio) and ratio > 0, ValueError, f"ratio should be finite and positive, found {ratio}")
    require(math.isfinite(lr * ratio), ValueError, f"lr times ratio should be finite, found {lr} and {ratio}")
    taken = [name for name in ("params", "lr") if name in settings]
    require(not taken, ValueError, f"{', '.join(taken)} cannot be given as a setting of both groups")
    matrices = {
        id(parameter)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _B
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast = [parameter for parameter in trained if id(parameter) in matrices]
    slow = [parameter for parameter in trained if id(parameter) not in matrices]
    require(bool(fast), ValueError, "no matrix B of an adapter asks for gradients; add adapters first")
    groups = [(slow, lr), (fast, lr * ratio)]
    return [{"params": parameters, "lr": rate, **settings} for parameters, rate in groups if parameters]
