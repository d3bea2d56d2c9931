"""Callbacks for when an optional library is imported, so that support for it costs nothing where it is not used."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_Callback = Callable[[ModuleType], None]

_waiting: dict[str, list[_Callback]] = {}


def when_imported(module_name: str, callback: _Callback) -> None:
    """Calls ``callback(module)`` when a module has been imported: at once if it is already, else right afterwards.

    Code that imports the module sees it only after the callback has returned. Looking for it
    (``importlib.util.find_spec``) is no import. An exception in the callback goes to whoever imports.
    """
    module = sys.modules.get(module_name)
    if module is not None:
        callback(module)
        return
    _waiting.setdefault(module_name, []).append(callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that something waits for, through the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """The real loader, and the callbacks after it. Everything else that a loader can do is the real one's."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)  # where it fails, the callbacks wait for another try
        for callback in _waiting.pop(module.__name__, ()):
            callback(module)
        if not _waiting and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_finder = _Finder()
