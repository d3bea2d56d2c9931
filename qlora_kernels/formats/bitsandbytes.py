"""bitsandbytes' 4-bit format, both ways and bit for bit: its tensors to an NF4Weight, and back.

A weight [N, K] of theirs is, under the weight's own key:

=====================================  ==============================================================================
``<key>``                              two codes a byte as here, viewed in any storage type, mostly [N*K/2, 1]
``<key>.absmax``                       uint8 codes, or floating constants without double quantization
``<key>.quant_map``                    float32 [16], the levels
``<key>.nested_absmax``                float32, one for each ``nested_blocksize`` of the codes
``<key>.nested_quant_map``             float32 [256], the codes' table
``<key>.quant_state.bitsandbytes__X``  uint8, the text of a JSON object: block sizes, shape, dtype, offset
=====================================  ==============================================================================

with X = nf4 or fp4, which differ in their levels alone. Their block sizes are powers of two. Blocks here have 64
weights, so a larger one is several with the same constant.
Both libraries decode by absmax = table[code] * nested_absmax + offset and weight = level * absmax, each operation
rounded to float32, and the result rounded to its dtype once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..ops.backends import reference
from ..storage.formats import parse_json
from .nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, PIECES, NF4Weight

#: What a quant_state's key ends with, before the quant_type.
STATE = "quant_state.bitsandbytes__"
#: The other tensors beside the weight, the first two always.
TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

#: FP4's levels: sign, two bits of exponent, one of fraction; the largest is 1.
_FP4 = [sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
_LONGEST = 1 << 40  # rows or columns: more than any memory holds, and their product is no number of 1,000 digits
_LARGEST_STATE = 1 << 16  # bytes of the JSON text; it has about 200


@dataclass(frozen=True)
class State:
    """What the JSON object of a weight says.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: weights to a constant.
        dtype: the dense weight's.
        shape: (N, K).
        nested_blocksize: codes to a second-level constant, or 0 without double quantization.
        nested_dtype: the type that they round decoded constants to.
        nested_offset: their mean.
    """

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, int]
    nested_blocksize: int = 0
    nested_dtype: torch.dtype = torch.float32
    nested_offset: float = 0.0

    @property
    def double_quant(self) -> bool:
        return self.nested_blocksize > 0

    @property
    def blocks(self) -> int:
        """How many constants the weight has."""
        return -(-math.prod(self.shape) // self.blocksize)

    def expected(self) -> dict[str, int]:
        """The number of elements of each tensor in :data:`TENSORS`; a nested one that is not there is left out."""
        sizes = {"absmax": self.blocks, "quant_map": 16}
        if self.double_quant:
            sizes |= {"nested_absmax": -(-self.blocks // self.nested_blocksize), "nested_quant_map": 256}
        return sizes


def parse_state(content: bytes, quant_type: str, where: str) -> State:
    """Reads and checks the JSON object.

    Args:
        content: its text in UTF-8.
        quant_type: what the key that it lies under ends with.
        where: what to call it in errors.

    Raises:
        ValueError: when it is not such an object, or something in it is out of range or cannot be represented here.
    """

    def require(usable: bool, what: str) -> None:
        if not usable:
            raise ValueError(f"{where}: {what}")

    require(len(content) <= _LARGEST_STATE, f"a JSON object of at most {_LARGEST_STATE} bytes was expected")
    value = parse_json(content, where)
    unknown = [key for key in value if key not in _KEYS]
    require(not unknown, f"{[*unknown, ''][0]!r:.50} is not known; known are {', '.join(_KEYS)}")
    found = value.get("quant_type")
    require(found == quant_type, f"quant_type should be {quant_type!r}, as its key says, found {found!r:.50}")
    size: Any = value.get("blocksize")
    require(_is_int(size) and size in _BLOCK_SIZES, f"blocksize should be one of {_BLOCK_SIZES}, found {size!r:.50}")
    require(
        size >= BLOCK_SIZE,
        f"blocks of {size} weights cannot be represented, only multiples of {BLOCK_SIZE}; load the model with "
        "bitsandbytes, make it dense (model.dequantize() in transformers) and call qlora_kernels.quantize_model",
    )
    dtype: Any = value.get("dtype")
    require(isinstance(dtype, str) and dtype in _DTYPES, f"dtype should be in {list(_DTYPES)}, found {dtype!r:.50}")
    shape: Any = value.get("shape")
    sizes = cast("list[Any]", shape) if isinstance(shape, list) else []
    usable = len(sizes) == 2 and all(_is_int(one) and 0 < one <= _LONGEST for one in sizes)
    require(usable, f"shape should be two positive sizes [N, K], found {shape!r:.50}")
    plain = State(quant_type, size, _DTYPES[dtype], (sizes[0], sizes[1]))
    nested = [key for key in _KEYS if key.startswith("nested_") and key in value]
    if not nested:
        return plain
    require(len(nested) == 3, f"nested_blocksize, nested_dtype and nested_offset come together, found only {nested}")
    size, dtype, offset = (value[key] for key in ("nested_blocksize", "nested_dtype", "nested_offset"))
    require(_is_int(size) and 0 < size <= 1 << 16, f"nested_blocksize should be in 1 to 65536, found {size!r:.50}")
    require(isinstance(dtype, str) and dtype in _DTYPES, f"nested_dtype should be in {list(_DTYPES)}: {dtype!r:.50}")
    require(_is_float32(offset), f"nested_offset should be a finite float32, found {offset!r:.50}")
    return replace(plain, nested_blocksize=size, nested_dtype=_DTYPES[dtype], nested_offset=float(offset))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float32(value: Any) -> bool:
    # Compared as they are: a number of 400 digits has no float.
    limit = torch.finfo(torch.float32).max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -limit <= value <= limit


def state_key(names: Mapping[str, Any], key: str) -> tuple[str, str]:
    """The name and the quant_type of a weight's JSON object.

    Args:
        names: what there is, by name.
        key: the weight's name.

    Raises:
        ValueError: when there is none, or more than one.
    """
    found = [(f"{key}.{STATE}{kind}", kind) for kind in ("nf4", "fp4") if f"{key}.{STATE}{kind}" in names]
    if len(found) != 1:
        number = "no" if not found else "more than one"
        raise ValueError(f"'{key}' has {number} {STATE}nf4 or _fp4 beside it; bitsandbytes writes one for a weight")
    return found[0]


def check_tensors(state: State, key: str, found: Callable[[str], tuple[torch.dtype | None, int] | None]) -> None:
    """Checks the types and sizes of a weight's tensors, before any of them is read.

    Args:
        state: what the weight's JSON object says.
        key: the weight's name.
        found: the dtype and the number of elements of a tensor by its name; None for one that is not there.

    Raises:
        ValueError: naming the tensor.
    """
    n, k = state.shape
    packed = found(key)
    if packed is None:
        raise ValueError(f"there is no '{key}'")
    dtype, count = packed
    size, wanted = (dtype.itemsize if dtype is not None else 1) * count, (n * k + 1) // 2
    if dtype is None or dtype.is_complex or dtype == torch.bool or size != wanted:
        text = f"{count} elements of {dtype}"
        raise ValueError(f"'{key}' should have {wanted} bytes, the codes of a weight [{n}, {k}], found {text}")
    expected = state.expected()
    for name in TENSORS:
        own, there = f"{key}.{name}", found(f"{key}.{name}")
        if name not in expected:
            if there is not None:
                raise ValueError(f"'{own}' belongs to double quantization, of which the quant_state says nothing")
            continue
        if there is None:
            raise ValueError(f"there is no '{own}'; it belongs to a weight of bitsandbytes")
        allowed = (torch.float32,)
        if name == "absmax":
            allowed = (torch.uint8,) if state.double_quant else tuple(_DTYPES.values())
        if there[0] not in allowed or there[1] != expected[name]:
            types = " or ".join(map(str, allowed))
            raise ValueError(f"'{own}' should be {expected[name]} x {types}, found {there[1]} x {there[0]}")


def from_bitsandbytes_state(tensors: Mapping[str, Tensor], key: str = "weight") -> NF4Weight:
    """A weight from bitsandbytes' tensors, without requantization: it decodes to the same bits.

    Where this package's format has no place for their second level (constants rounded to 16 bits, or blocks that are
    no multiple of 256 of ours), the constants are decoded as they do it, and kept in float32: 4.5 bits a weight.

    Args:
        tensors: theirs by name; more of them do no harm.
        key: the weight's name.

    Raises:
        ValueError: when they do not fit together, or the weight cannot be represented; the sentence names the tensor.
        TypeError: when one is not a tensor.
        RuntimeError: when the memory of one was freed.
    """
    name, kind = state_key(tensors, key)
    for own in (key, name, *(f"{key}.{piece}" for piece in TENSORS)):
        if own in tensors and not isinstance(tensors[own], Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"'{own}' should be a tensor, found {type(tensors[own]).__name__}")
    text = tensors[name]
    if text.dtype != torch.uint8 or text.is_meta or text.numel() > _LARGEST_STATE:
        raise ValueError(f"'{name}' should be at most {_LARGEST_STATE} bytes with their data, found {text.dtype}")
    state = parse_state(text.detach().cpu().contiguous().numpy().tobytes(), kind, f"'{name}'")

    def found(own: str) -> tuple[torch.dtype, int] | None:
        return (tensors[own].dtype, tensors[own].numel()) if own in tensors else None

    check_tensors(state, key, found)
    pieces = {piece: tensors[f"{key}.{piece}"].detach() for piece in state.expected()}
    if _is_transposed(state, pieces["absmax"]):
        pieces["absmax"] = pieces["absmax"].t()
    pieces = {piece: value.flatten() for piece, value in pieces.items()}
    packed = tensors[key].detach().contiguous().view(-1).view(torch.uint8)
    constants = _constants(state, pieces)
    levels = _own_levels(state, pieces["quant_map"], key)
    if levels is not None:
        table = constants[3]
        constants = (*constants[:3], levels if table is None else torch.cat([table, levels]))
    weight = dict(zip(PIECES, (packed, *constants), strict=True))
    present = {piece: value for piece, value in weight.items() if value is not None}
    present["shape"] = torch.tensor(state.shape, dtype=torch.int64)
    try:
        return NF4Weight.from_state_dict(present, dtype=state.dtype)
    except ValueError as error:
        raise ValueError(f"'{key}': {error}") from None


def _is_transposed(state: State, absmax: Tensor) -> bool:
    """Whether constants lie as [K/blocksize, N] rather than in a row.

    On a CPU with AVX512-BF16 bitsandbytes lays them out so in eval mode, and when it brings a layer's codes back into
    order, as ``state_dict()`` makes it, it leaves them there. It would itself decode them in the wrong order.
    """
    n, k = state.shape
    return not state.double_quant and absmax.shape == (k // state.blocksize, n) and k % state.blocksize == 0


def _own_levels(state: State, levels: Tensor, key: str) -> Tensor | None:
    """The levels of a weight, or None for NF4's."""
    is_nf4 = state.quant_type == "nf4"
    expected = reference.levels() if is_nf4 else _fp4_levels()
    # bitsandbytes goes by the name and never looks at the levels, so others would be decoded differently.
    if not torch.equal(levels.cpu(), expected):
        raise ValueError(f"'{key}.quant_map' should be the 16 levels of {state.quant_type.upper()}, found others")
    return None if is_nf4 else levels.contiguous()


def _fp4_levels() -> Tensor:
    return torch.tensor(_FP4, dtype=torch.float32)


_Constants = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _constants(state: State, pieces: Mapping[str, Tensor]) -> _Constants:
    """absmax, nested_absmax, nested_offset and nested_table as the package has them."""
    repeat = state.blocksize // BLOCK_SIZE
    blocks = -(-math.prod(state.shape) // BLOCK_SIZE)

    def spread(values: Tensor, times: int, count: int) -> Tensor:
        values = values.repeat_interleave(times)[:count] if times > 1 else values
        return values.contiguous()

    absmax = spread(pieces["absmax"], repeat, blocks)
    if not state.double_quant:
        return absmax.float(), None, None, None
    nested, table = pieces["nested_absmax"].contiguous(), pieces["nested_quant_map"].contiguous()
    offset = torch.tensor([state.nested_offset], dtype=torch.float32, device=absmax.device)
    times, rest = divmod(state.nested_blocksize * repeat, NESTED_BLOCK_SIZE)
    if rest == 0 and state.nested_dtype == torch.float32:
        return absmax, spread(nested, times, -(-blocks // NESTED_BLOCK_SIZE)), offset, table
    # bitsandbytes rounds the product to nested_dtype, adds the offset in it, and only then goes on in float32.
    codes = pieces["absmax"].long()
    scales = nested.repeat_interleave(state.nested_blocksize)[: codes.numel()]
    decoded = (table[codes] * scales).to(state.nested_dtype)
    decoded += offset[0]
    return spread(decoded.float(), repeat, blocks), None, None, None


def quant_type(weight: NF4Weight) -> str:
    """What bitsandbytes calls a weight's levels: "nf4" or "fp4".

    Raises:
        ValueError: for other levels, which it would not use: it decodes by the name.
    """
    if weight.has_nf4_levels:
        return "nf4"
    found = weight.levels.detach().cpu()
    if torch.equal(found, _fp4_levels()):
        return "fp4"
    raise ValueError("its levels are neither NF4's nor FP4's, and bitsandbytes knows no others")


def to_bitsandbytes_state(weight: NF4Weight, key: str = "weight") -> dict[str, Tensor]:
    """The inverse: bitsandbytes' tensors for a weight, which decode to the same bits there.

    Raises:
        ValueError: for a weight in float64 or with levels of its own, which bitsandbytes does not know.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    if weight.dtype not in names:
        raise ValueError(f"a weight for {weight.dtype}; bitsandbytes takes only {', '.join(names.values())}")
    kind = quant_type(weight)
    settings: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": BLOCK_SIZE,
        "dtype": names[weight.dtype],
        "shape": list(weight.shape),
    }
    tensors = {
        key: weight.packed.detach().view(-1, 1),
        f"{key}.absmax": weight.absmax.detach(),
        f"{key}.quant_map": weight.levels.detach().clone(),
    }
    if weight.nested_absmax is not None and weight.nested_offset is not None and weight.nested_table is not None:
        settings |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.nested_offset.item(),
        }
        tensors[f"{key}.nested_absmax"] = weight.nested_absmax.detach()
        # A copy: weights share their table, and safetensors refuses tensors that share memory.
        tensors[f"{key}.nested_quant_map"] = weight.nested_table.detach().flatten()[:256].clone()
    text = json.dumps(settings).encode()
    tensors[f"{key}.{STATE}{kind}"] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    return tensors
