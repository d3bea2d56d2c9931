"""What `import qlora_kernels` shows, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import qlora_kernels


def test_completion_shows_public_names_only():
    shown = [name for name in dir(qlora_kernels) if not name.startswith("__")]
    assert shown == sorted(name for name in qlora_kernels.__all__ if not name.startswith("__"))
    assert all(getattr(qlora_kernels, name) is not None for name in dir(qlora_kernels) if name != "__spec__")


def test_an_import_loads_no_optional_package():
    optional = ("transformers", "safetensors", "matplotlib", "tqdm", "peft", "bitsandbytes", "qlora_kernels._C")
    code = (
        "import sys, torch; before = set(sys.modules); import qlora_kernels; "
        f"print([name for name in {optional} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
