"""Makes quant_method "qlora_kernels" known to transformers, when and if that is imported."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType

_TARGET = "transformers.quantizers.auto"
_ATTRIBUTES = "LOADING_ATTRIBUTES_CONFIG_TYPES"


class _Watcher(MetaPathFinder):
    """Finds the target as the other finders do, with a loader that registers the quantizer after the import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Registering(self, spec.loader)
                return spec
        return None


class _Registering(Loader):
    """Another loader, and the registration after it."""

    def __init__(self, watcher: _Watcher, loader: Loader) -> None:
        self._watcher, self._loader = watcher, loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, which inspect and pkgutil ask for sources.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._watcher in sys.meta_path:
            sys.meta_path.remove(self._watcher)
        _register(module)


def register() -> None:
    """Registers the quantizer now if transformers' quantizers are loaded, or else as soon as they are.

    Costs nothing where transformers is never imported.
    """
    module = sys.modules.get(_TARGET)
    if module is not None and hasattr(module, "AUTO_QUANTIZER_MAPPING"):
        _register(module)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register(auto: ModuleType) -> None:
    from ...models.quantize import after_quantizing
    from . import quantizer  # noqa: F401  it enters itself, since its own import may be what has led here
    from .mark import mark
    from .nf4_config import NF4Config

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NF4Config.quant_method] = NF4Config
    # Configs whose loading attributes an argument of from_pretrained may add to those of a quantized folder.
    types = getattr(auto, _ATTRIBUTES, None)
    if isinstance(types, tuple) and NF4Config not in types:
        setattr(auto, _ATTRIBUTES, (*types, NF4Config))
    if mark not in after_quantizing:
        after_quantizing.append(mark)
