"""ggml's products with Q4_0 weights, which llama.cpp computes with, through the ctypes of PyPI's ggml-python.

Q4_0 stores 32 weights as 4-bit levels around 8 and a float16 scale. The product rounds each row of x to int8, 32
numbers at a time (Q8_0), and multiplies integers. Rows of x and y are float32 there, as in llama.cpp.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch
from torch import Tensor

from ..timing.machine import beyond

#: Weights that share a scale, and their bytes: the scale and 32 levels.
BLOCK, BLOCK_BYTES = 32, 18
_METADATA = 1 << 20


def ggml() -> Any:
    """ggml-python, which need not be installed.

    Raises:
        ModuleNotFoundError: where it is not.
    """
    return importlib.import_module("ggml")


def compiled_for(library: Any) -> str:
    """The best of this package's names of instruction sets that the library was compiled for; it chooses none later."""
    if library.ggml_cpu_has_avx512_bf16():
        return "avx512_bf16"
    if library.ggml_cpu_has_avx512():
        return "avx512"
    return "avx2" if library.ggml_cpu_has_avx2() else "portable"


def check_set(limit: str | None) -> None:
    """Refuses a library that was compiled for more than the rest of the run is limited to.

    Raises:
        RuntimeError: saying how to make one that was not.
    """
    compiled = compiled_for(ggml())
    if beyond(compiled, limit):
        raise RuntimeError(
            f"compiled for {compiled}, beyond {limit}; pip install ggml-python --no-binary with CMAKE_ARGS="
            f"'-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON' elsewhere, and put that in PYTHONPATH"
        )


def quantized(weight: Tensor) -> Tensor:
    """A weight [n, k] in Q4_0, as bytes.

    Raises:
        ValueError: where k is no multiple of 32, which Q4_0 does not have.
    """
    n, k = weight.shape
    if k % BLOCK:
        raise ValueError(f"Q4_0 has blocks of {BLOCK}, and k is {k}")
    library, source = ggml(), weight.float().contiguous()
    packed = torch.empty(n * k // BLOCK * BLOCK_BYTES, dtype=torch.uint8)
    numbers = ctypes.cast(source.data_ptr(), ctypes.POINTER(ctypes.c_float))
    written = library.ggml_quantize_chunk(library.GGML_TYPE_Q4_0, numbers, packed.data_ptr(), 0, n, k, None)
    if written != packed.numel():
        raise RuntimeError(f"ggml wrote {written} bytes of Q4_0 where {packed.numel()} were expected")
    return packed


def decoded(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """What Q4_0 stands for, in float64: levels 0 to 15 around 8; the low nibbles come first."""
    blocks = packed.view(-1, BLOCK_BYTES)
    scales = blocks[:, :2].contiguous().view(torch.float16).double()
    codes = blocks[:, 2:]
    levels = torch.cat([codes & 15, codes >> 4], 1).double() - 8
    return (levels * scales).view(shape)


class Product:
    """y = x W^T over copies of a Q4_0 weight: a graph of one node for each, planned ahead.

    Args:
        weights: of :func:`quantized`, each of ``shape``.
        shape: (n, k).
        x: [m, k]; float32.
        threads: of ggml's own pool.
    """

    def __init__(self, weights: list[Tensor], shape: tuple[int, int], x: Tensor, threads: int) -> None:
        self._library = library = ggml()
        self._kept: list[Any] = [weights]
        self.x, self.y = x.contiguous(), torch.empty(x.shape[0], shape[0])
        # What it makes is kept until the process ends, which is the case's own.
        size = _METADATA + len(weights) * (library.ggml_graph_overhead_custom(8, False) + 8 * 1024)
        self._context = library.ggml_init(library.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True))
        # Threads that wait for work asleep: those that poll take the cores from the contender that comes next.
        options = library.ggml_threadpool_params_default(threads)
        options.poll = 0
        self._pool = library.ggml_threadpool_new(ctypes.byref(options))
        self._plans = [self._plan(weight, shape, threads) for weight in weights]

    def _tensor(self, kind: int, columns: int, rows: int, memory: Tensor) -> Any:
        tensor = self._library.ggml_new_tensor_2d(self._context, kind, columns, rows)
        tensor.contents.data = memory.data_ptr()
        return tensor

    def _plan(self, weight: Tensor, shape: tuple[int, int], threads: int) -> tuple[Any, Any]:
        library, (n, k), m = self._library, shape, self.x.shape[0]
        product = library.ggml_mul_mat(
            self._context,
            self._tensor(library.GGML_TYPE_Q4_0, k, n, weight),
            self._tensor(library.GGML_TYPE_F32, k, m, self.x),
        )
        product.contents.data = self.y.data_ptr()
        graph = library.ggml_new_graph_custom(self._context, 8, False)
        library.ggml_build_forward_expand(graph, product)
        plan = library.ggml_graph_plan(graph, threads, self._pool)
        work = torch.empty(max(plan.work_size, 1), dtype=torch.uint8)
        plan.work_data = ctypes.cast(work.data_ptr(), ctypes.POINTER(ctypes.c_uint8))
        self._kept.append(work)
        return graph, plan

    def __call__(self, index: int) -> Tensor:
        """y [m, n] of that copy; the next call overwrites it."""
        graph, plan = self._plans[index]
        status = self._library.ggml_graph_compute(graph, ctypes.byref(plan))
        if status:
            raise RuntimeError(f"ggml_graph_compute ended with status {status}")
        return self.y
