"""Callbacks for when a module is imported."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from qlora_kernels.interop.import_hooks import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module and gives its name; it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    name = "a_module_for_import_hooks"

    def write(text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield write
    sys.modules.pop(name, None)


def test_the_callback_comes_after_the_import_and_once(module):
    name, before, seen = module("value = 1\n"), list(sys.meta_path), []
    when_imported(name, lambda found: seen.append(found.value))
    assert importlib.util.find_spec(name) is not None  # looking is no import
    assert not seen
    imported = importlib.import_module(name)
    assert seen == [1]
    assert type(imported.__loader__).__module__ != "qlora_kernels.interop.import_hooks"
    assert imported.__spec__.loader is imported.__loader__
    del sys.modules[name]
    importlib.import_module(name)
    assert seen == [1]
    assert len(sys.meta_path) <= len(before) + 1


def test_at_once_for_a_module_that_is_there(module):
    name, seen = module("value = 2\n"), []
    importlib.import_module(name)
    when_imported(name, lambda found: seen.append(found.value))
    assert seen == [2]


def test_an_import_that_fails_can_be_tried_again(module):
    name, seen = module("1 / 0\n"), []
    when_imported(name, lambda found: seen.append(found.value))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(name)
    assert not seen
    module("value = 333\n")
    importlib.import_module(name)
    assert seen == [333]
