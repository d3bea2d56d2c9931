"""What the compiler made of each CUDA kernel: registers, shared memory, instructions, wide accesses.

    python -m bench.compiled.static WHEEL

reads a wheel (or the extension itself), prints a table, and writes it to bench/results/ as JSON and Markdown, so that a
review shows what a change does to the code. It needs no GPU. tests/build/test_static_gates.py compares a build with
these files and with each kernel's budget.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT))

import setup_cuda  # noqa: E402
from bench.compiled import loops, sass  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "results"
FORMAT = 1
TITLE = "# What the compiler made of the CUDA kernels\n"

#: A kernel left out for an architecture is a trap, which has at most this many instructions.
MOST_OF_A_TRAP = 4

#: Header and expression of the dynamic shared memory a kernel is launched with; T is its first template argument.
SHARED = {
    "dequantize_kernel": ("cuda/quantize/dequantize.cuh", "sizeof(DequantizeTraits<T>::Shared)"),
    "quantize_kernel": ("cuda/quantize/quantize.cuh", "sizeof(QuantizeTraits<T>::Shared)"),
    "quantize_absmax_kernel": ("cuda/quantize/quantize_absmax.cuh", "sizeof(QuantizeAbsmaxTraits::Shared)"),
    # Depends on M and K; here M = 8, K = 4096.
    "few_kernel": ("cuda/linear/mma/rows8.cuh", "few_shared(8, 4096)"),
    "middle_kernel": ("cuda/linear/mma/rows64.cuh", "sizeof(<second>::Shared)"),
    "gemm_kernel": ("cuda/linear/mma/tiles.cuh", "sizeof(<second>::Shared)"),
    "grouped_gemm_kernel": ("cuda/linear/grouped.cuh", "sizeof(<second>::Shared)"),
    "warpgroup_kernel": ("cuda/linear/wgmma/warpgroups.cuh", "warpgroup_shared(<second>::kRows)"),
    "adapter_down_kernel": ("cuda/linear/adapters.cuh", "sizeof(<second>::Shared)"),
    "adapter_gradient_kernel": ("cuda/linear/adapters.cuh", "sizeof(<second>::Shared)"),
    "adapter_sum_kernel": ("cuda/common/parts.cuh", "size_t{0}"),
    "narrow_kernel": ("cuda/linear/narrow.cuh", "size_t{0}"),
    "product_kernel": ("cuda/linear/simt/product.cuh", "sizeof(ProductTraits::Shared)"),
    "grouped_product_kernel": ("cuda/linear/grouped.cuh", "sizeof(ProductTraits::Shared)"),
    "optimizer_step_kernel": ("cuda/optimizer/optimizer.cuh", "sizeof(OptimizerShared<<second>>)"),
    "optimizer_norm_kernel": ("cuda/optimizer/norm.cuh", "sizeof(OptimizerNormShared)"),
    "absmax_sums_kernel": ("cuda/quantize/quantize_absmax.cuh", "size_t{0}"),
}

#: Kernels whose main loop decodes and multiplies; ``numbers`` are the numbers among the template arguments.
LOOPS = {
    # A step is two chunks, and a thread has 64 weights of each. FFMA applies constants to sums. What runs without
    # products only loads, where a warp has no chunk left.
    "few_kernel": loops.Kind(decode=("PRMT", "=LDS", "FFMA"), weights=2 * 64, seldom=0.0),
    # 16 weights of each of eight rows; numbers[0] is the rows of x. What an iteration may skip decodes the constants of
    # four steps, in one of two ways; both are counted.
    "middle_kernel": loops.Kind(
        decode=("PRMT", "=LDS", "FFMA"), weights=8 * 16, products=lambda numbers: 2 * numbers[0], seldom=1 / 4
    ),
    # A step is a block of 64 in depth: 32 weights of a thread.
    "warpgroup_kernel": loops.Kind(decode=("PRMT", "=LDS", "FFMA"), weights=32, products=lambda numbers: 4),
    # Of 256 threads each decodes half a block, or with 256 columns (numbers[1]) a whole one.
    "gemm_kernel": loops.Kind(
        decode=("PRMT", "LOP3", "SHF", "IMAD.SHL", "F2FP", "FMUL"),
        weights=lambda numbers: numbers[1] // 4,
    ),
    "grouped_gemm_kernel": loops.Kind(
        decode=("PRMT", "LOP3", "SHF", "IMAD.SHL", "F2FP", "FMUL"),
        weights=lambda numbers: numbers[1] // 4,
    ),
}


def tool(name: str) -> str:
    """The path of cuobjdump or nvcc.

    Raises:
        FileNotFoundError: saying what to install.
    """
    path = setup_cuda.find_tool(name)
    if path is None:
        hint = setup_cuda.INSTALL if name == "nvcc" else "pip install '.[cuda-tools]'"
        raise FileNotFoundError(f"{name} was not found; {hint}")
    return path


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"'{command[0]}' failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def readable(symbols: list[str]) -> dict[str, str]:
    """Demangled names without namespace and parameters, such as "dequantize_kernel<bf16, true>"."""
    lines = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, line in zip(symbols, lines.splitlines()):
        name = re.sub(r"\(.*\)$|^void |qlk::cuda::", "", line)
        names[symbol] = name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("> >", ">>")
    return names


def dynamic_shared(kernels: list[str]) -> dict[str, int]:
    """Bytes of dynamic shared memory of each kernel: a program compiled by nvcc prints its sizeof.

    Raises:
        KeyError: for a kernel that SHARED doesn't list.
    """
    lines = ["#include <cstdio>"]
    unlisted = [name for name in kernels if name.partition("<")[0] not in SHARED]
    if unlisted:
        raise KeyError(f"bench/compiled/static.py, SHARED: list {', '.join(unlisted)}")
    lines += [f'#include "{header}"' for header in sorted({SHARED[name.partition("<")[0]][0] for name in kernels})]
    lines += ["using namespace qlk::cuda;", "int main() {"]
    for name in kernels:
        base, _, arguments = name.partition("<")
        first, _, second = arguments.removesuffix(">").partition(", ")
        expression = SHARED[base][1].replace("<T>", f"<{first}>").replace("<second>", second)
        lines.append(f'    std::printf("%s\\t%zu\\n", "{name}", {expression});')
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "sizes.cu"), Path(folder, "sizes")
        source.write_text("\n".join([*lines, "}", ""]))
        compiler = setup_cuda.Compiler.at(tool("nvcc"))
        include = [f"-I{ROOT / 'csrc' / 'cuda' / 'device'}", f"-I{ROOT / 'csrc'}"]
        # -L, because nvcc does not look where PyPI's compiler packages put the library.
        _run(
            compiler.path, "-std=c++17", "-arch=sm_80", *include, f"-L{compiler.runtime.parent}",
            *("-o", str(program), str(source)),
        )  # fmt: skip
        return {name: int(size) for name, size in (line.split("\t") for line in _run(str(program)).splitlines())}


def functions(module: Path) -> list[sass.Function]:
    """The machine code of every kernel in the extension."""
    return sass.parse(_run(tool("cuobjdump"), "-sass", str(module)))


def rows(module: Path) -> list[dict[str, Any]]:
    """A row for each kernel and architecture, sorted by name."""
    code = functions(module)
    usage = sass.parse_usage(_run(tool("cuobjdump"), "-res-usage", str(module)))
    names = readable(sorted({one.symbol for one in code}))
    shared = dynamic_shared(sorted(set(names.values())))
    table = []
    for one in code:
        resources = usage[one.architecture, one.symbol]
        wide = {name: sum(1 for i in one.named(name) if i.bits == 128) for name in ("LDG", "STG")}
        table.append(
            {
                "kernel": names[one.symbol],
                "arch": one.architecture,
                "registers": resources["REG"],
                # From sm_90 on this includes the 1 KiB of each block that the hardware reserves.
                "shared_static": resources["SHARED"],
                "shared_dynamic": shared[names[one.symbol]],
                "stack": resources["STACK"],
                "local": resources["LOCAL"],
                "local_accesses": len(one.local_accesses),
                "instructions": one.count,
                "code_bytes": one.size,
                "ldg128": wide["LDG"],
                "stg128": wide["STG"],
                "ldg": len(one.named("LDG")),
                "stg": len(one.named("STG")),
                "ldc_indexed": len(one.indexed_constants),
                "membar_sc": sum(1 for i in one.named("MEMBAR") if ".SC" in i.opcode),
                "cluster_barriers": len(one.named("UCGABAR_ARV")),
                **loop_figures(names[one.symbol], one),
            }
        )
    return sorted(table, key=lambda row: (row["kernel"], _number(row["arch"])))


def numbers_in(kernel: str) -> list[int]:
    """The numbers among a kernel's template arguments: of "gemm_kernel<bf16, GemmTraits<bf16, false, 128, 256, 2,
    4>>", 128, 256, 2 and 4."""
    return [int(number) for number in re.findall(r"\b\d+\b", kernel)]


def loop_figures(kernel: str, code: sass.Function) -> dict[str, float]:
    """What a step of the main loop issues, by class (bench/compiled/loops.py).

    Zeros where LOOPS lists the kernel but its loop is not found; nothing for other kernels.
    """
    kind = LOOPS.get(kernel.partition("<")[0])
    if kind is None:
        return {}
    step = loops.step_of(code, kind, numbers_in(kernel)) or loops.Step.nothing()
    return {
        **{f"step_{name}": count for name, count in step.counts.items()},
        "step_outside": step.outside,
        "slots_per_weight": step.slots_per_weight,
        **{f"{part}_{pipe}": count for part in loops.PARTS for pipe, count in vars(step.parts[part]).items()},
        "decode_beside": step.decode_beside,
        "alone_ldsm": step.alone_ldsm,
    }


def _number(architecture: str) -> tuple[int, str]:
    digits = re.search(r"\d+", architecture)
    assert digits is not None, architecture
    return int(digits[0]), architecture


def report(module: Path) -> dict[str, Any]:
    """The table and the compiler it holds for."""
    table = rows(module)
    return {
        "format": FORMAT,
        "nvcc": nvcc_version(),
        "archs": sorted({row["arch"] for row in table}, key=_number),
        "extension_bytes": module.stat().st_size,
        "kernels": table,
    }


def by_architecture(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each architecture: kernels with and without code, bytes of code, most registers of a thread, spills."""
    result = []
    for arch in sorted({row["arch"] for row in table}, key=_number):
        own = [row for row in table if row["arch"] == arch]
        with_code = [row for row in own if row["instructions"] > MOST_OF_A_TRAP]
        result.append(
            {
                "arch": arch,
                "kernels": len(with_code),
                "left_out": len(own) - len(with_code),
                "code_bytes": sum(row["code_bytes"] for row in own),
                "registers": max(row["registers"] for row in own),
                "local_accesses": sum(row["local_accesses"] for row in own),
            }
        )
    return result


def nvcc_version() -> str:
    """nvcc's version, on which the generated code depends."""
    release = re.search(r"V(\d+\.\d+\.\d+)", _run(tool("nvcc"), "--version"))
    if release is None:
        raise RuntimeError("nvcc --version names no version")
    return release[1]


def path_for(archs: list[str], folder: Path = FOLDER) -> Path:
    """The file of a report: static-sm80-sm90a.json."""
    return folder / f"static-{'-'.join(one.replace('_', '') for one in archs)}.json"


COLUMNS = {
    "kernel": "kernel",
    "arch": "arch",
    "registers": "registers",
    "shared_static": "shared, static",
    "shared_dynamic": "dynamic",
    "stack": "stack",
    "local_accesses": "LDL + STL",
    "instructions": "instructions",
    "code_bytes": "code bytes",
    "ldg128": "LDG.128",
    "ldg": "of LDG",
    "stg128": "STG.128",
    "stg": "of STG",
    "ldc_indexed": "LDC by lane",
    "membar_sc": "MEMBAR.SC",
    "cluster_barriers": "cluster barriers",
}

LOOP_COLUMNS = {
    "step_hmma": "HMMA",
    "step_decode": "decode",
    "step_ldsm": "LDSM",
    "step_lds": "LDS",
    "step_sts": "STS",
    "step_ldgsts": "LDGSTS",
    "step_other": "other",
    "step_outside": "outside",
    "slots_per_weight": "decode / weight",
}

PIPES = {"issue": "all", "alu": "ALU", "fma": "FMA"}


def markdown(result: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        TITLE,
        f"nvcc {result['nvcc']}; written by `python -m bench.compiled.static WHEEL`. Shared memory in bytes a block.\n",
        f"| {' | '.join(COLUMNS.values())} |",
        f"|{'---|' * 2}{'---:|' * (len(COLUMNS) - 2)}",
    ]
    lines += [f"| {' | '.join(str(row[key]) for key in COLUMNS)} |" for row in result["kernels"]]
    lines += [
        "\n## Main loops\n",
        "What a warp issues in a step of the main loop, on average, where everything is aligned and inside. The rules",
        "stand in bench/compiled/loops.py. `outside` is all but HMMA and decoding. The last column: instructions that",
        "decode, for each weight that a thread decodes.\n",
        f"| kernel | arch | {' | '.join(LOOP_COLUMNS.values())} |",
        f"|{'---|' * 2}{'---:|' * len(LOOP_COLUMNS)}",
    ]
    for row in result["kernels"]:
        if "slots_per_weight" in row:
            cells = (f"{row[key]:.2f}".rstrip("0").rstrip(".") for key in LOOP_COLUMNS)
            lines.append(f"| {row['kernel']} | {row['arch']} | {' | '.join(cells)} |")
    columns = {f"{part}_{pipe}": f"{part}, {word}" for part in loops.PARTS for pipe, word in PIPES.items()}
    columns |= {"decode_beside": "decode beside", "alone_ldsm": "LDSM alone"}
    lines += [
        "\n## Main loops by pipe\n",
        "The same instructions by part of a step: `alone` before the first product after a barrier, or after the last,",
        "`beside` from the first product to the last, `decode` all decoding. ALU: integer and logic operations and",
        "half of IMAD. FMA: float operations and the other half. The last columns: the share of decoding that lies",
        "between products; loads of operands that the first products wait for.\n",
        f"| kernel | arch | {' | '.join(columns.values())} |",
        f"|{'---|' * 2}{'---:|' * len(columns)}",
    ]
    for row in result["kernels"]:
        if "decode_beside" in row:
            cells = (f"{row[key]:.2f}".rstrip("0").rstrip(".") for key in columns)
            lines.append(f"| {row['kernel']} | {row['arch']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def module_of(path: Path, folder: Path) -> Path:
    """The extension in a wheel, unpacked to a folder; or the file itself."""
    if path.suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if re.search(r"/_C\.[^/]*so$", name))
        return Path(wheel.extract(name, folder))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled.static", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, metavar="WHEEL", help="a wheel with CUDA kernels, or its extension _C*.so")
    parser.add_argument("--out", type=Path, help="the JSON file; beside it the Markdown; default: in bench/results")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result = report(module_of(options.path, folder))
    out = options.out or path_for(result["archs"])
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
