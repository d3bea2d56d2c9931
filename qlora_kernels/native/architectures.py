"""CUDA architectures: how they are asked for, how a wheel names them, which cards they serve.

An architecture is written as in QLORA_KERNELS_CUDA_ARCHS: the compute capability without its dot, ``a`` behind it for
code of this architecture alone, ``f`` for its family, ``+PTX`` where the intermediate code goes along: "90a",
"120+PTX". setup.py reads this file before anything is installed: it imports nothing of the package, nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: What the kernels' instructions need: ld.global with an L2 prefetch size, in csrc/cuda/device/ptx.cuh.
OLDEST = 75
#: What "all" stands for: Turing, Ampere (A100; A10, RTX 30), Ada, Hopper, Blackwell (B200; RTX 50), and PTX for later.
ALL = ("75", "80", "86", "89", "90a", "100a", "120+PTX")

_ONE = re.compile(r"(\d{2,3})([af]?)(\+PTX)?")
# Systems on a chip: "binary compatibility between desktop and Tegra is not supported" (CUDA C++ Programming Guide).
_ON_CHIP = {(7, 2), (8, 7), (10, 1), (11, 0)}


def parse(text: str) -> tuple[str, ...]:
    """The architectures of a list such as "80;90a;120+PTX" (commas and spaces may part it, too), oldest first.

    Raises:
        ValueError: with one sentence, for a list that is none or names what the kernels cannot be built for.
    """
    ptx: dict[tuple[int, str], bool] = {}
    for word in filter(None, re.split(r"[;,\s]+", text)):
        match = _ONE.fullmatch(word.replace("+ptx", "+PTX"))
        # Suffixes began with 9.0 (a) and 10.0 (f).
        if not match or (match[2] and int(match[1]) < {"a": 90, "f": 100}[match[2]]):
            raise ValueError(
                f"QLORA_KERNELS_CUDA_ARCHS should be native, none, all or a list such as '80;90a;120+PTX', and "
                f"'{word}' is no CUDA architecture"
            )
        if int(match[1]) < OLDEST:
            raise ValueError(
                f"QLORA_KERNELS_CUDA_ARCHS names {word}, and the kernels need architecture {OLDEST} or a later one"
            )
        key = int(match[1]), match[2]
        ptx[key] = ptx.get(key, False) or bool(match[3])
    if not ptx:
        raise ValueError(
            "QLORA_KERNELS_CUDA_ARCHS should be native, none, all or a list such as '80;90a;120+PTX', and is empty; "
            "unset it for native"
        )
    return tuple(f"{number}{suffix}{'+PTX' if with_ptx else ''}" for (number, suffix), with_ptx in sorted(ptx.items()))


def for_card(major: int, minor: int) -> str:
    """The architecture to build for a card: with its own instructions, where kernels have a use for them."""
    return f"{major}{minor}{'a' if major in (9, 10) else ''}"


def parts(architecture: str) -> tuple[int, str, bool]:
    """Number, suffix and whether PTX goes along: ``(120, "", True)`` for "120+PTX"."""
    match = _ONE.fullmatch(architecture)
    if match is None:
        raise ValueError(f"'{architecture}' is no CUDA architecture")
    return int(match[1]), match[2], bool(match[3])


def names(built: Iterable[str]) -> list[str]:
    """What a build has, as the compiler's tools call it: sm_N is machine code, compute_N is PTX."""
    split = [(f"{number}{suffix}", ptx) for number, suffix, ptx in map(parts, built)]
    return [f"sm_{one}" for one, _ in split] + [f"compute_{one}" for one, ptx in split if ptx]


def local_version(cuda: str, built: Iterable[str]) -> str:
    """What follows the version in the name of a wheel: "+cu130.sm80.sm120.compute120"; nothing without kernels.

    Args:
        cuda: release of the compiler, "13.0".
        built: architectures.
    """
    found = [name.replace("_", "") for name in names(built)]
    return "+" + ".".join([f"cu{cuda.replace('.', '')}", *found]) if found else ""


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
    has = [one for one in built.split(";") if one]
    if any(_serves(one, major, minor) for one in has):
        return None
    card = f"{card} is of architecture sm_{major}{minor}"
    if major * 10 + minor < OLDEST:
        return f"{card}, and the kernels of qlora_kernels need sm_{OLDEST} or a later one"
    kernels = f"kernels for {', '.join(names(has))} alone" if has else "no CUDA kernels"
    return (
        f"{card}, and this build of qlora_kernels has {kernels}; build it for this card, in the source folder and "
        f"with nvcc installed: QLORA_KERNELS_CUDA_ARCHS='{for_card(major, minor)}' pip install ."
    )


def _serves(architecture: str, major: int, minor: int) -> bool:
    number, suffix, ptx = parts(architecture)
    its_major, its_minor = divmod(number, 10)
    if (its_major, its_minor) == (major, minor):
        return True
    if suffix == "a":
        return False
    if ptx and not suffix and (its_major, its_minor) <= (major, minor):
        return True
    if {(its_major, its_minor), (major, minor)} & _ON_CHIP:
        return False
    return its_major == major and its_minor <= minor
