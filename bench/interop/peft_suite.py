"""Runs PEFT's own tests of LoRA with the linear layers of their models in 4 bits.

    python -m bench.interop.peft_suite FOLDER --out bench/results/peft-suite.json

FOLDER holds PEFT's tests, as its source distribution does (pip download --no-deps --no-binary :all: peft). They run
twice: as they are, and with each nn.Linear of a model that a test defines replaced by a QLinear of rank 0, except where
the test's configuration trains the layer itself (modules_to_save). What counts are the tests that pass the first time
and put LoRA on an nn.Linear.
"""

from __future__ import annotations

import argparse
import functools
import importlib.machinery
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILES = ("test_custom_models.py", "test_initialization.py", "test_lora_variants.py")


class Watch:
    """A pytest plugin: quantizes models if asked to, and keeps each test's outcome."""

    def __init__(self, quantize: bool) -> None:
        self.quantize = quantize
        self.trained: tuple[str, ...] = ()  # modules that the test's configuration trains themselves
        self.layers = 0  # LoRA layers on linear layers made in this test
        self.results: dict[str, dict[str, Any]] = {}

    def pytest_configure(self) -> None:
        from importlib import import_module

        from torch import nn

        lora: Any = import_module("peft.tuners.lora.model")
        lora.dispatch_default = self._counting(lora.dispatch_default)
        if not self.quantize:
            return
        watch = self

        def init_subclass(cls: type[nn.Module], **_: Any) -> None:
            if cls.__module__.rpartition(".")[2].startswith("test_") and "__init__" in cls.__dict__:
                cls.__init__ = watch._quantizing(cls.__init__)

        nn.Module.__init_subclass__ = classmethod(init_subclass)  # pyright: ignore[reportAttributeAccessIssue]

    def _quantizing(self, init: Any) -> Any:
        from torch import nn

        from qlora_kernels import QLinear

        @functools.wraps(init)
        def __init__(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(module, *args, **kwargs)
            for parent in list(module.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is nn.Linear and name not in self.trained:
                        setattr(parent, name, QLinear.from_linear(child, rank=0))

        return __init__

    def _counting(self, dispatch: Any) -> Any:
        from torch import nn

        @functools.wraps(dispatch)
        def counted(*args: Any, **kwargs: Any) -> Any:
            layer = dispatch(*args, **kwargs)
            self.layers += layer is not None and isinstance(layer.get_base_layer(), nn.Linear)
            return layer

        return counted

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        kinds = [getattr(_params(item).get("config_cls"), "__name__", "LoraConfig") for item in items]
        items[:] = [item for item, kind in zip(items, kinds, strict=True) if kind == "LoraConfig"]

    def pytest_runtest_setup(self, item: Any) -> None:
        settings = [value for value in _params(item).values() if isinstance(value, dict)]
        self.trained = tuple(name for one in settings for name in one.get("modules_to_save") or ())
        self.layers = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        reason = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:300]
        name = report.nodeid.rpartition("tests/")[2]
        self.results[name] = {"outcome": report.outcome, "layers": self.layers, "reason": reason}


def _params(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def run_once(folder: str, quantize: bool, out: str) -> None:
    """One of the two runs; writes {test: {outcome, layers, reason}}."""
    import pytest

    import qlora_kernels  # noqa: F401

    if importlib.util.find_spec("diffusers") is None:  # imported by what all tests share, used by none of these
        sys.modules["diffusers"] = stub = types.ModuleType("diffusers")
        stub.__dict__["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
        stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    watch = Watch(quantize)
    files = [f"{folder}/{name}" for name in FILES if Path(folder, name).exists()]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=line", "-rN", "-W", "ignore"]
    pytest.main([*files, *options, "--rootdir", str(Path(folder).parent)], plugins=[watch])
    Path(out).write_text(json.dumps(watch.results))


def summary(dense: dict[str, Any], quantized: dict[str, Any]) -> dict[str, Any]:
    """What the two runs say together."""
    concerned = sorted(name for name, one in dense.items() if one["outcome"] == "passed" and one["layers"])
    outcomes = {name: quantized.get(name, {"outcome": "missing", "reason": ""}) for name in concerned}
    failed = {
        name: re.sub(r"0x[0-9a-f]+", "0x", one["reason"]) or one["outcome"]
        for name, one in outcomes.items()
        if one["outcome"] != "passed"
    }
    return {
        "versions": {name: version(name) for name in ("peft", "torch", "transformers")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "files": list(FILES),
        "dense": dict(Counter(one["outcome"] for one in dense.values())),
        "tests": len(concerned),
        "passed": len(concerned) - len(failed),
        "reasons": dict(Counter(failed.values()).most_common()),
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="PEFT's tests")
    parser.add_argument("--out", required=True, help="where the result goes, JSON")
    parser.add_argument("--run", choices=("dense", "quantized"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_once(options.folder, options.run == "quantized", options.out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        tests = Path(temporary, "tests")  # to be a package, which a source distribution's tests are not
        shutil.copytree(options.folder, tests)
        (tests / "__init__.py").touch()
        results: list[dict[str, Any]] = []
        for run in ("dense", "quantized"):
            out = Path(temporary, f"{run}.json")
            command = [sys.executable, "-m", "bench.interop.peft_suite", str(tests), "--run", run, "--out", str(out)]
            subprocess.run(command, check=True)
            results.append(json.loads(out.read_text()))
    Path(options.out).write_text(json.dumps(summary(*results), indent=1) + "\n")


if __name__ == "__main__":
    main()
