"""What came with sm_90, of a whole block or two: the emulator's twins against numpy, and a card against the same."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cuda_code.fragments import U32, fragment
from emulated import ROOT, emulated, module

from bench.emulator import conformance_module

#: The kernels of conformance_sm90.cu. A copied tensor's name ends with the swizzle of its boxes, a product's with its
#: columns, the layout of its operands in shared memory and those that are transposed.
KERNELS = (
    *("movmatrix", "stmatrix", "bulk copies", "cluster", "product bf16", "product fp16"),
    *(f"tensor {way} {swizzle}" for way in ("load", "store") for swizzle in ("plain", "32", "64", "128")),
    *("wgmma bf16 64 plain", "wgmma bf16 64 plain a", "wgmma bf16 64 plain b"),
    *("wgmma bf16 64 swizzled 32", "wgmma bf16 64 swizzled 32 a b", "wgmma bf16 64 swizzled 64"),
    *("wgmma bf16 64 swizzled 64 a b", "wgmma bf16 64 swizzled 128", "wgmma bf16 64 swizzled 128 a"),
    *("wgmma bf16 128 swizzled 128 b", "wgmma fp16 256 swizzled 128 a b"),
    *(f"wgmma {dtype} {columns} registers" for dtype in ("bf16", "fp16") for columns in (16, 32, 64, 128)),
    *("wgmma bf16 128 registers b", "wgmma bf16 256 registers"),
)
ROWS, BOX_ROWS, STEPS = 70, 24, 5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Where a kernel puts a box of a tensor: column and row of its first element.
CORNERS = ((-5, -3), (13, ROWS - 17))


def words_of(name: str) -> tuple[int, int]:
    """How many words a kernel takes and gives."""
    return module().wide_kernels()[name]


def dtype_of(name: str) -> torch.dtype | None:
    return next((dtype for word, dtype in DTYPES.items() if word in name), None)


def operands(name: str, exact: bool) -> torch.Tensor:
    """int32 [words]: random bits, or elements near 1; `exact`: small integers, whose sums no card rounds."""
    words = words_of(name)[0]
    random = np.random.default_rng(0)
    dtype = dtype_of(name)
    if dtype is None:
        return torch.from_numpy(random.integers(0, 2**32, words, dtype=np.uint32).view(np.int32))
    many = 64 * 64 * STEPS * 2 if name.startswith("product") else 16 * (64 + columns_of(name))
    elements = random.integers(-8, 9, many) if exact else random.standard_normal(many)
    packed = torch.from_numpy(elements).to(dtype).view(torch.int32)
    sums = random.integers(-512, 512, words - many // 2) + 0.5 if exact else random.standard_normal(words - many // 2)
    return torch.cat([packed, torch.from_numpy(sums).float().view(torch.int32)])


def columns_of(name: str) -> int:
    return int(name.split()[2])


def run(kernels, name: str, given: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    # Whole rows of 64 bytes for the tensor maps, on either side.
    given = given.to(device, copy=True)
    results = torch.full((words_of(name)[1],), -1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    kernels.run_wide(name, given.data_ptr(), results.data_ptr(), 0, stream)
    return results.cpu()


# ---------------------------------------------------------------------------------------------- what they should give


def half(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint16)


def words(elements: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(elements.astype(np.uint16)).view(U32).reshape(-1)


def expected_stmatrix(x):
    lanes = half(x).reshape(32, 4, 2)  # lane, matrix, element: row lane / 4, columns 2 * (lane % 4) and the next
    matrices = lanes.reshape(8, 4, 4, 2).transpose(2, 0, 1, 3).reshape(4, 8, 8)
    return np.concatenate([words(matrices), words(matrices.transpose(0, 2, 1))])


def span_of(name: str) -> int:
    way = name.split()[2]
    return 128 if way == "plain" else int(way)


def order_in_shared_memory(name: str) -> np.ndarray:
    """For each 16-bit slot of a box's memory, the element that lies there."""
    span = span_of(name)
    place = np.arange(BOX_ROWS * span // 2) * 2
    mask = 0 if "plain" in name else {32: 1, 64: 3, 128: 7}[span]
    return (place ^ ((place >> 7 & mask) << 4)) // 2


def boxes(name: str):
    """For each corner, the rows and columns of a box, and which of its elements are in the tensor."""
    width = span_of(name) // 2
    for column, row in CORNERS:
        rows, columns = np.meshgrid(np.arange(BOX_ROWS) + row, np.arange(width) + column, indexing="ij")
        yield rows, columns, (rows >= 0) & (rows < ROWS) & (columns >= 0) & (columns < width + 8)


def expected_tensor_load(name, x):
    tensor = half(x).reshape(ROWS, -1)
    out = []
    for rows, columns, inside in boxes(name):
        box = np.where(inside, tensor[np.where(inside, rows, 0), np.where(inside, columns, 0)], 0)
        out.append(words(box.reshape(-1)[order_in_shared_memory(name)]))
    return np.concatenate(out)


def expected_tensor_store(name, x):
    tensor = np.full((ROWS, span_of(name) // 2 + 8), 0xFFFF, np.uint16)
    box = half(x)[order_in_shared_memory(name)].reshape(BOX_ROWS, -1)  # the order is its own inverse
    for rows, columns, inside in boxes(name):
        tensor[rows[inside], columns[inside]] = box[inside]
    return words(tensor)


def matrices(name, x):
    """float64 a [64, K], b [N, K], and, for one instruction, c [64, N]."""
    dtype = dtype_of(name)
    columns, depth = (64, 64 * STEPS) if name.startswith("product") else (columns_of(name), 16)
    many = (64 + columns) * depth // 2
    elements = torch.from_numpy(x[:many].view(np.int32).copy()).view(dtype).double().numpy()
    a, b = elements[: 64 * depth].reshape(64, depth), elements[64 * depth :].reshape(columns, depth)
    c = None if many == len(x) else from_lanes(x[many:].view(np.float32).reshape(128, -1).astype(np.float64))
    return a, b, c


def from_lanes(registers):
    columns = 2 * registers.shape[1]
    whole = np.full((64, columns), np.nan)
    whole[fragment(columns)] = registers
    return whole


def expected_product(name, x):
    a, b, c = matrices(name, x)
    product = a @ b.T
    if c is None:
        return product.reshape(-1)
    at = fragment(columns_of(name))
    return np.concatenate([(c + 2 * product)[at], product[at]], 1).reshape(-1)


def bound(name, x):
    """A bound on the error where each addend is cut to 24 bits of the largest, several times."""
    a, b, c = matrices(name, x)
    size = np.abs(a) @ np.abs(b).T
    if c is None:
        return size.reshape(-1) * 2.0**-19
    at = fragment(columns_of(name))
    return np.concatenate([(np.abs(c) + 2 * size)[at], size[at]], 1).reshape(-1) * 2.0**-21


def expected_bits(name, x):
    if name == "movmatrix":
        return words(half(x).reshape(8, 8).T)
    if name == "stmatrix":
        return expected_stmatrix(x)
    if name == "bulk copies":
        return np.roll(x, 128) + U32(1)
    if name == "cluster":
        sums = np.zeros(64, U32)
        for block in x.reshape(2, 64, 4):
            sums = sums * U32(31) + block @ np.array([1, 3, 5, 7], U32)
        return np.concatenate([sums + U32(1), sums])
    return (expected_tensor_load if "load" in name else expected_tensor_store)(name, x)


def check(name: str, given: torch.Tensor, results: torch.Tensor, exact: bool) -> None:
    x, bits = given.numpy().view(U32), results.numpy().view(U32)
    if dtype_of(name) is None:
        wrong = bits != expected_bits(name, x)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} words differ"
        return
    error = np.abs(bits.view(np.float32) - expected_product(name, x))
    limit = 0 if exact else bound(name, x)
    assert (error <= limit).all(), f"{name}: off by {np.nanmax(error):.3g}, {np.isnan(error).sum()} NaN"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("landing", ["earliest", "latest", "random"])
def test_the_twins_do_what_the_isa_says(name, landing):
    for order in ("forward", "reverse", "random"):
        for exact in (True, False) if dtype_of(name) else (True,):
            given = operands(name, exact)
            with emulated(order, landing, seed=3):
                check(name, given, run(module(), name, given), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_the_card_does_what_the_isa_says(name):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("of sm_90a")
    for exact in (True, False) if dtype_of(name) else (True,):
        given = operands(name, exact)
        check(name, given, run(conformance_module(), name, given, "cuda"), exact)


def test_every_kernel_is_named_here():
    assert sorted(KERNELS) == sorted(module().wide_kernels())


def test_a_wrong_bit_is_seen():
    name = "wgmma bf16 64 swizzled 128"
    for exact, bit in ((True, 1), (False, 1 << 8)):
        given = operands(name, exact)
        results = run(module(), name, given)
        results[77] ^= bit
        with pytest.raises(AssertionError, match="off by"):
            check(name, given, results, exact)


def test_every_function_of_ptx_sm90_has_a_twin_and_is_used_here():
    cuda, twins, *kernels = (
        (ROOT / path).read_text()
        for path in (
            *("csrc/cuda/device/ptx_sm90.cuh", "tests/emulator/ptx_sm90.cuh"),
            *("tests/emulator/conformance_sm90.cu", "tests/emulator/sm90_kernels.cuh"),
        )
    )
    names = set(re.findall(r"^QLK_DEVICE [\w*]+ (\w+)\(", cuda, re.MULTILINE))
    assert {"wgmma_ss", "tensor_load", "mbarrier_wait", "cluster_map", "setmaxnreg_dec"} <= names
    # No result shows how many registers there are.
    unused = {"setmaxnreg_inc", "setmaxnreg_dec"}
    for name in sorted(names):
        assert re.search(rf"^(?:inline )?[\w*]+ {name}\(", twins, re.MULTILINE), f"{name} has no twin"
        used = any(re.search(rf"\b{name}(?:<.*>)?\(", text) for text in kernels)
        assert used != (name in unused), f"{name} is used: {used}"
