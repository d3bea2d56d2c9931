"""What this build contains, and what it runs on."""

from __future__ import annotations

import re
from typing import Any

from ..version import BASE


def build_info() -> dict[str, Any]:
    """Facts for a bug report, as plain values.

    Returns:
        A dictionary with ``version``, ``torch``, ``native`` (whether the extension loads), ``compiler``,
        ``isas_built``, ``isas_available`` and ``isa_in_use`` (instruction sets), ``cuda_archs`` (architectures
        built in, as "90a" or "120+PTX") and, where there are any, ``nvcc`` (its release), ``gpus`` (names and compute
        capabilities seen), ``threads``; and ``problem`` when the extension does not load.
    """
    import torch

    from . import extension

    info: dict[str, Any] = {"version": version(), "torch": torch.__version__, "native": True}
    try:
        native = extension.native().build_info()
        # The extension gives lists as words with commas or, as in QLORA_KERNELS_CUDA_ARCHS, semicolons between.
        listed = [key for key in native if key.startswith("isas_") or key == "cuda_archs"]
        info.update(native | {key: re.findall("[^,;]+", native[key]) for key in listed})
    except ImportError as error:
        info.update(native=False, problem=str(error))
    info["gpus"] = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    info["threads"] = torch.get_num_threads()
    return info


def describe(info: dict[str, Any]) -> str:
    """The same for people."""
    lines = [("qlora_kernels", info["version"]), ("torch", info["torch"])]
    if info["native"]:
        lines += [
            ("compiler", info.get("compiler", "unknown")),
            ("instruction sets built in", _list(info.get("isas_built"))),
            ("available here", _list(info.get("isas_available"))),
            ("in use", info.get("isa_in_use", "unknown")),
            ("CUDA architectures built in", _list(info.get("cuda_archs"))),
            *([("nvcc", info["nvcc"])] if "nvcc" in info else []),
        ]
    else:
        lines.append(("native extension", info["problem"]))
    lines += [("GPUs seen", _list(info["gpus"])), ("threads", str(info["threads"]))]
    width = max(len(title) for title, _ in lines)
    return "\n".join(f"{title:<{width}}  {value}" for title, value in lines)


def _list(values: Any) -> str:
    return ", ".join(map(str, values)) if values else "none"


def version() -> str:
    """The version of what runs: as the extension was built, "0.1.0+cu130.sm80.sm90a" with CUDA kernels inside."""
    from . import extension

    try:
        return extension.native().__version__
    except (ImportError, AttributeError):  # not built, or built from sources older than this file
        return BASE
