"""The command line: ``qlora-kernels finetune``, ``quantize``, ``bench`` and ``info``."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence

from ..bench.options import add_arguments as add_bench_arguments
from ..console.cores import restart_if_cores_are_busy
from ..errors import InputError, missing_extra, sentence, sentence_of
from ..finetune.arguments import add_arguments, from_arguments
from ..native.build_info import version
from .info import run_info
from .quantize import run_quantize


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; by default the process's.

    Returns:
        0; 2 for input that cannot be used, after one sentence on stderr; 128 + signal when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if argv is None and options.command == "finetune":
        restart_if_cores_are_busy()
    try:
        _check_forced()
        return options.run(options, arguments)
    except InputError as error:
        print(f"qlora-kernels {options.command}: {sentence(error)}", file=sys.stderr)
    except ImportError as error:
        print(f"qlora-kernels {options.command}: {_missing(error)}", file=sys.stderr)
    except OSError as error:
        print(f"qlora-kernels {options.command}: {sentence_of(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"qlora-kernels {options.command}: interrupted", file=sys.stderr)
        return 130
    return 2


def _check_forced() -> None:
    """Checks QLORA_KERNELS_CPU_ISA and QLORA_KERNELS_CUDA_KERNEL now, rather than at the first call of a kernel.

    Raises:
        InputError: naming the instruction sets, or the kernels, that there are.
    """
    isa, kernel = (os.environ.get(f"QLORA_KERNELS_{name}") for name in ("CPU_ISA", "CUDA_KERNEL"))
    if not isa and not kernel:
        return
    import torch

    from ..native import dispatch, extension

    with contextlib.suppress(ImportError):  # without the extension 'info' says so, and the others stop
        try:
            extension.native().build_info()
            if kernel:  # a case that every kernel can take
                dispatch.choose(dispatch.CARDS[90], 1, 64, 64, torch.bfloat16, False)
        except RuntimeError as error:
            raise InputError(_without_source(error)) from None


def _without_source(error: RuntimeError) -> str:
    """The extension's sentence, without the source line and the expression in it."""
    return re.sub(r"^\S+:\d+: | \(failed: .*\)$", "", sentence(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qlora-kernels", description="QLoRA with hand-written kernels.")
    parser.add_argument("--version", action="version", version=f"qlora-kernels {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    finetune = commands.add_parser(
        "finetune",
        help="quantize a model to 4 bits, train adapters on it, evaluate",
        description="A whole QLoRA run. With no arguments: a tiny model on Python's language reference, in minutes.",
    )
    add_arguments(finetune)
    finetune.set_defaults(run=_finetune)

    quantize = commands.add_parser(
        "quantize",
        help="write a model's folder with 4-bit weights",
        description="Reads a Hugging Face folder of safetensors and writes one with 4-bit linear layers, one tensor in "
        "memory at a time.",
    )
    quantize.add_argument("model", metavar="MODEL", help="folder with config.json and safetensors")
    quantize.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    quantize.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="size of a file (default 2GB)")
    quantize.add_argument(
        "--no-double-quant",
        dest="double_quant",
        action="store_false",
        help="keep the block constants in float32: 4.5 bits per weight instead of 4.127",
    )
    quantize.add_argument("--quiet", action="store_true", help="no progress bar")
    quantize.set_defaults(run=run_quantize)

    bench = commands.add_parser(
        "bench",
        help="measure this package beside torch, bitsandbytes and PEFT",
        description="Every operation beside its peers in one run, each case in its own process: verified, then timed "
        "in turns. Prints tables, and writes figures and plots to files.",
    )
    add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="what this build contains and what it runs on")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.add_argument(
        "--dispatch",
        nargs=2,
        type=int,
        metavar=("N", "K"),
        help="print instead which CUDA kernel multiplies with a weight [N, K], by rows of x",
    )
    info.add_argument(
        "--arch",
        type=int,
        metavar="NUMBER",
        help="with --dispatch: for another architecture than this machine's, such as 90",
    )
    info.set_defaults(run=run_info)
    return parser


def _finetune(namespace: argparse.Namespace, arguments: list[str]) -> int:
    settings = from_arguments(namespace)
    from ..finetune.run import finetune

    return finetune(settings, arguments[1:])


def _bench(namespace: argparse.Namespace, arguments: list[str]) -> int:
    from ..bench.command import command

    return command(namespace)


def _missing(error: ImportError) -> str:
    """What to install for a package that is missing."""
    package = (error.name or "").split(".")[0]
    if package in ("", "qlora_kernels"):
        return sentence(error)
    return str(missing_extra(package, "finetune"))


if __name__ == "__main__":
    sys.exit(main())
