"""CUDA architectures: how to request them, how a wheel names them, which cards they serve.

An architecture is written as in QLORA_KERNELS_CUDA_ARCHS: the compute capability without its dot, followed by ``a`` for
code specific to this architecture, ``f`` for its family, ``+PTX`` to include the intermediate code: "90a", "120+PTX".
setup.py reads this file before anything is installed, so it imports neither torch nor anything from the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: The oldest with all instructions that the kernels use: ld.global with an L2 prefetch size (csrc/cuda/device/ptx.cuh).
OLDEST = 75
#: "all": Turing, Ampere (A100; A10, RTX 30), Ada, Hopper, Blackwell (B200; RTX 50), and PTX for later ones.
ALL = ("75", "80", "86", "89", "90a", "100a", "120+PTX")

_ONE = re.compile(r"(\d{2,3})([af]?)(\+PTX)?")
# Systems on a chip: "binary compatibility between desktop and Tegra is not supported" (CUDA C++ Programming Guide).
_ON_CHIP = {(7, 2), (8, 7), (10, 1), (11, 0)}


def parse(text: str) -> tuple[str, ...]:
    """The architectures in a list such as "80;90a;120+PTX" (commas and spaces separate too), oldest first.

    Raises:
        ValueError: with one sentence, for an invalid list or an architecture the kernels cannot be built for.
    """
    ptx: dict[tuple[int, str], bool] = {}
    for word in filter(None, re.split(r"[;,\s]+", text)):
        match = _ONE.fullmatch(word.replace("+ptx", "+PTX"))
        # The suffixes exist since 9.0 (a) and 10.0 (f).
        if not match or (match[2] and int(match[1]) < {"a": 90, "f": 100}[match[2]]):
            raise ValueError(
                f"QLORA_KERNELS_CUDA_ARCHS should be native, none, all or a list such as '80;90a;120+PTX', and "
                f"'{word}' is not a CUDA architecture"
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
    """The architecture to build for a card: architecture-specific where the kernels benefit."""
    return f"{major}{minor}{'a' if major in (9, 10) else ''}"


def parts(architecture: str) -> tuple[int, str, bool]:
    """Number, suffix and whether PTX is included: ``(120, "", True)`` for "120+PTX"."""
    match = _ONE.fullmatch(architecture)
    if match is None:
        raise ValueError(f"'{architecture}' is not a CUDA architecture")
    return int(match[1]), match[2], bool(match[3])


def names(built: Iterable[str]) -> list[str]:
    """A build's architectures as NVIDIA's tools name them: sm_N is machine code, compute_N is PTX."""
    split = [(f"{number}{suffix}", ptx) for number, suffix, ptx in map(parts, built)]
    return [f"sm_{one}" for one, _ in split] + [f"compute_{one}" for one, ptx in split if ptx]


def local_version(cuda: str, built: Iterable[str]) -> str:
    """The local version in a wheel's name, "+cu130.sm80.sm120.compute120"; empty without CUDA kernels.

    Args:
        cuda: the compiler's release, "13.0".
        built: architectures.
    """
    labels = [name.replace("_", "") for name in names(built)]
    return "+" + ".".join([f"cu{cuda.replace('.', '')}", *labels]) if labels else ""


def unserved(built: str, major: int, minor: int, card: str) -> str | None:
    """A sentence if a build has no kernels for a card, or None if it has.

    Machine code runs on cards with the same major version and the same or a higher minor one; with the suffix ``a``
    (architecture-specific) only on its own architecture, with ``f`` within its family. PTX ("120+PTX") also runs on
    every later card, where the driver compiles it (CUDA C++ Programming Guide, "Compute Capabilities" and
    "Compatibility").

    Args:
        built: architectures separated by semicolons, as in QLORA_KERNELS_CUDA_ARCHS: "80;90a;120+PTX".
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
