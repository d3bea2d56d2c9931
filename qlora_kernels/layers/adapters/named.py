"""Named low-rank adapters: a layer can hold several, of which one is active."""

# Users' arguments are checked whatever their annotations say.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false
# The functions at the end, for other packages, use the layer's private attributes.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import peft_names, require
from ..packed import PackedLayer, is_sharded
from .config import AdapterConfig


class Adapters(PackedLayer):
    """A layer on a packed weight that adds, selects, disables and deletes low-rank adapters."""

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def _set_up_adapters(self, config: AdapterConfig, dtype: torch.dtype | None) -> None:
        self._adapter_dtype = dtype  # None: that of the layer
        self._adapters: dict[str, AdapterConfig] = {}
        self._active: str | None = None
        self._disabled = 0  # depth of disable_adapters()
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        if config.rank:
            self._add_adapter("default", config)

    @property
    def adapters(self) -> dict[str, AdapterConfig]:
        """The adapters' configurations by name (a copy)."""
        return dict(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        return self._active

    @property
    def merged_adapter_name(self) -> str | None:
        """The adapter that :meth:`merge` folded in, or None."""
        return self._merged

    @property
    def rank(self) -> int:
        """The active adapter's rank, 0 without one."""
        return 0 if self._active is None else self._adapters[self._active].rank

    @property
    def scaling(self) -> float:
        """The active adapter's alpha / r or alpha / sqrt(r), 0 without one."""
        return 0.0 if self._active is None else self._adapters[self._active].scaling

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            known = ", ".join(map(repr, self._adapters)) or "none"
            raise KeyError(f"no adapter {name!r} in this layer; it has: {known}")

    @peft_names
    def add_adapter(
        self,
        name: str,
        rank: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Adds an adapter, A Kaiming-uniform and B zero; it becomes active only when none is.

        Raises:
            ValueError: for a name that is taken, empty, has a '.' in it or is reserved, and for rank < 1, or a value
                out of range.
            RuntimeError: for a layer that FSDP2 has sharded.
        """
        refuse_sharded(self, f"adapter {name!r} cannot be added")
        if name in self._adapters:
            raise ValueError(f"there is an adapter {name!r} already; this layer has: {', '.join(self._adapters)}")
        config = AdapterConfig(rank, alpha, dropout, rslora)
        config.check(self.out_features, self.in_features)
        require(rank > 0, ValueError, f"the rank of adapter {name!r} should be at least 1, found {rank}")
        self._add_adapter(name, config, dtype)

    def _add_adapter(self, name: str, config: AdapterConfig, dtype: torch.dtype | None = None) -> None:
        check_adapter_name(self, name)
        dtype, device = dtype or self._adapter_dtype or self._dtype, self.weight_packed.device
        A = torch.empty(config.rank, self.in_features, dtype=dtype, device=device)
        B = torch.empty(self.out_features, config.rank, dtype=dtype, device=device)
        init_adapter(A, B)
        put_adapter(self, name, config, A, B)

    def set_adapter(self, name: str | None) -> None:
        """Makes an adapter the active one, or none with None.

        The active adapter's matrices get ``requires_grad=True``, all others' False.

        Raises:
            KeyError: for an unknown name; the message lists the known.
            RuntimeError: while an adapter is merged.
        """
        if name is not None:
            self._known(name)
        if name == self._active:
            return
        if self._merged is not None:
            raise RuntimeError(f"adapter '{self._merged}' is merged into the base; call unmerge() first")
        self._active = name
        for other in self._adapters:
            self.lora_A[other].requires_grad_(other == name)
            self.lora_B[other].requires_grad_(other == name)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter; when it was the active one, none is, until :meth:`set_adapter`.

        Raises:
            KeyError: for an unknown name.
            RuntimeError: for the one that is merged, and for a layer that FSDP2 has sharded.
        """
        self._known(name)
        refuse_sharded(self, f"adapter {name!r} cannot be deleted")
        if name == self._merged:
            raise RuntimeError(f"adapter '{name}' is merged into the base; call unmerge() first")
        del self._adapters[name], self.lora_A[name], self.lora_B[name]
        if name == self._active:
            self._active = None

    @contextlib.contextmanager
    def disable_adapters(self) -> Generator[None, None, None]:
        """Within it the layer is its base alone. May be nested.

        Raises:
            RuntimeError: while an adapter is merged, since the base then includes it.
        """
        if self._merged is not None:
            raise RuntimeError(f"adapter '{self._merged}' is merged into the base; call unmerge() first")
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    def _dtype_has_changed(self) -> None:
        self._adapter_dtype = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside disable_adapters() would stay disabled: nothing leaves the context for it.
        return super().__getstate__() | {"_disabled": 0}


# ------------------------------------------------------------------------ for the package: adapters that come with data


def check_adapter_name(layer: Adapters, name: str) -> None:
    """Checks that a new adapter can have this name. Attributes of ParameterDict ("keys", ...) cannot be keys of one.

    Raises:
        ValueError: when it cannot.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(layer.lora_A, name):
        raise ValueError(f"an adapter's name is a word without '.', and not a reserved one; found {name!r}")


def refuse_sharded(layer: Adapters, what: str) -> None:
    """FSDP2 notes the parameters of a layer when it shards it: it would neither shard nor synchronize new ones.

    Raises:
        RuntimeError: for a layer that it has sharded.
    """
    if is_sharded(layer._parameters.get("weight_packed")):
        raise RuntimeError(f"the layer is sharded by FSDP2, and {what}; do that before fully_shard")


def adapter_options(layer: Adapters, name: str) -> dict[str, Any]:
    """dtype and device for an adapter's matrices: those it has, or those of a new one."""
    if name in layer.adapters:
        return {"dtype": layer.lora_A[name].dtype, "device": layer.lora_A[name].device}
    return {"dtype": layer._adapter_dtype or layer.dtype, "device": layer.weight_packed.device}


def put_adapter(layer: Adapters, name: str, config: AdapterConfig, A: Tensor, B: Tensor) -> None:
    """Adds or replaces an adapter; it becomes active only when none is. Nothing is checked here."""
    if layer._active is None and layer.merged_adapter_name is None:
        layer._active = name
    layer._adapters[name] = config
    layer.lora_A[name] = nn.Parameter(A, requires_grad=name == layer._active)
    layer.lora_B[name] = nn.Parameter(B, requires_grad=name == layer._active)


def set_config(layer: Adapters, name: str, config: AdapterConfig) -> None:
    """Gives an adapter other settings of the same rank. Nothing is checked here."""
    layer._adapters[name] = config


def init_adapter(A: Tensor, B: Tensor) -> None:
    if not A.is_meta:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)
