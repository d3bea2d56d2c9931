"""CUDA architectures: which cards a build serves."""

from __future__ import annotations

import re


def unserved(built: str, major: int, minor: int, card: str) -> str | None:
    """The sentence for a card that a build has no kernels for, or None when it has.

    Machine code for one architecture runs on cards of the same major version and at least its minor one; with the
    suffix ``a`` (arch-specific) or ``f`` (family) only where that says; PTX ("120+PTX") also runs on all that come
    later, and the driver compiles it there (CUDA C++ Programming Guide, "Compute Capabilities" and "Compatibility").

    Args:
        built: architectures with semicolons between, as in QLORA_KERNELS_CUDA_ARCHS: "80;90a;120+PTX".
        major, minor: the card's compute capability.
        card: its name.
    """
    if any(_serves(one, major, minor) for one in built.split(";") if one):
        return None
    wanted = f"{major}{minor}" + ("a" if major in (9, 10) else "")
    has = "no CUDA kernels" if not built else f"kernels for {', '.join('sm_' + one for one in built.split(';'))} alone"
    return (
        f"{card} is of architecture sm_{major}{minor}, and this build of qlora_kernels has {has}; build it for this "
        f"card, in the source folder and with nvcc installed: QLORA_KERNELS_CUDA_ARCHS='{wanted}' pip install ."
    )


def _serves(architecture: str, major: int, minor: int) -> bool:
    number, suffix, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", architecture).groups()
    its_major, its_minor = divmod(int(number), 10)
    if suffix == "a":
        return (its_major, its_minor) == (major, minor)
    if ptx and not suffix and (its_major, its_minor) <= (major, minor):
        return True
    return its_major == major and its_minor <= minor
