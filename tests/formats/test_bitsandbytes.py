"""bitsandbytes' tensors to ours and back: the same bits as the real library decodes; and tensors that do not fit."""

from __future__ import annotations

import json
import math

import pytest
import torch

from qlora_kernels import linear, quantize
from qlora_kernels.formats.bitsandbytes import from_bitsandbytes_state, to_bitsandbytes_state

pytest.importorskip("bitsandbytes")
from bitsandbytes import functional as F
from bnb_models import decoded, tensors_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Blocks of 64 and of more than a row; a last block that is not full; odd rows and an odd number of weights; and more
# than 256 blocks, so that there is a second constant of the second level.
SHAPES = [(64, 64), (5, 30), (7, 33), (1, 64), (33, 96), (17, 4098), (32, 4096)]
NESTED, QUANT_STATE = "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
def test_weights_decode_to_the_same_bits(blocksize, double_quant, kind):
    for shape in SHAPES:
        for dtype in DTYPES:
            packed, state = F.quantize_4bit(
                torch.randn(shape, dtype=dtype), blocksize=blocksize, compress_statistics=double_quant, quant_type=kind
            )
            weight = from_bitsandbytes_state(tensors_of(packed, state))
            assert (weight.shape, weight.dtype, weight.double_quant) == (shape, dtype, double_quant)
            # Sums with 0 make both zeros one: FP4 has two, and which of them stands nowhere else.
            assert torch.equal(bits(weight.dequantize() + 0), bits(decoded(packed, state) + 0)), (shape, dtype)


def test_constants_that_bitsandbytes_left_in_columns():
    """A state dict taken after a forward pass in eval mode, on a CPU with AVX512-BF16, has them so."""
    packed, state = F.quantize_4bit(torch.randn(64, 256, dtype=torch.bfloat16), compress_statistics=False)
    tensors = tensors_of(packed, state)
    tensors["weight.absmax"] = state.absmax.bfloat16()
    expected = from_bitsandbytes_state(tensors).dequantize()
    tensors["weight.absmax"] = state.absmax.view(64, 4).t().bfloat16().contiguous()
    assert torch.equal(from_bitsandbytes_state(tensors).dequantize(), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_there_and_back(double_quant, kind):
    packed, state = F.quantize_4bit(torch.randn(96, 130), compress_statistics=double_quant, quant_type=kind)
    theirs = tensors_of(packed, state)
    ours = to_bitsandbytes_state(from_bitsandbytes_state(theirs))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert ours[key].dtype == tensor.dtype
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_quantized_here_decode_there_to_the_same_bits(dtype, double_quant):
    weight = quantize(torch.randn(70, 200, dtype=dtype), double_quant)
    tensors = to_bitsandbytes_state(weight)
    packed = tensors.pop("weight")
    state = F.QuantState.from_dict({key.removeprefix("weight."): t for key, t in tensors.items()}, torch.device("cpu"))
    assert torch.equal(bits(decoded(packed, state)), bits(weight.dequantize()))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8])
def test_any_storage_type(storage):
    packed, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    for view in (packed, packed.view(1, -1), packed.flatten()):
        weight = from_bitsandbytes_state(tensors_of(view, state))
        assert torch.equal(weight.dequantize(), decoded(packed, state))


def test_the_product_is_that_of_the_decoded_weight():
    packed, state = F.quantize_4bit(torch.randn(48, 128), blocksize=256, compress_statistics=True, quant_type="fp4")
    weight, x = from_bitsandbytes_state(tensors_of(packed, state)), torch.randn(3, 128)
    torch.testing.assert_close(linear(x, weight), x @ decoded(packed, state).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constants_rounded_to_16_bits(dtype):
    """As bitsandbytes saves a layer that has run on a CPU with AVX512-BF16."""
    packed, state = F.quantize_4bit(torch.randn(64, 512, dtype=dtype), quant_type="nf4")
    absmax = state.absmax.to(dtype)
    state.offset = absmax.mean()
    state.absmax, state.state2 = F.quantize_blockwise(absmax - state.offset, blocksize=256)
    state.nested = True
    assert state.state2.dtype == dtype
    weight = from_bitsandbytes_state(tensors_of(packed, state))
    assert not weight.double_quant
    assert torch.equal(bits(weight.dequantize()), bits(F.dequantize_4bit(packed, state)))

    state.absmax, state.nested, state.state2 = absmax, False, None
    assert torch.equal(from_bitsandbytes_state(tensors_of(packed, state)).absmax, absmax.float())


@pytest.mark.parametrize("nested_blocksize", [64, 128, 512, 1024])
def test_second_level_blocks_of_another_size(nested_blocksize):
    packed, state = F.quantize_4bit(torch.randn(64, 1024), quant_type="nf4")
    state.offset = state.absmax.mean()
    state.absmax, state.state2 = F.quantize_blockwise(state.absmax - state.offset, blocksize=nested_blocksize)
    state.nested = True
    weight = from_bitsandbytes_state(tensors_of(packed, state))
    assert weight.double_quant == (nested_blocksize >= 256)
    assert torch.equal(bits(weight.dequantize()), bits(decoded(packed, state)))


# ---------------------------------------------------------------------------------------------------- what is refused


def valid(double_quant=True, **options):
    packed, state = F.quantize_4bit(torch.ones(8, 64), compress_statistics=double_quant, quant_type="nf4", **options)
    return tensors_of(packed, state)


def with_text(text):
    return valid() | {QUANT_STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def with_settings(**changes):
    return with_text(json.dumps(json.loads(bytes(valid()[QUANT_STATE].tolist())) | changes))


BAD_SETTINGS = {
    "a size that overflows": ({"shape": [2**62, 2**62]}, "shape should be two positive sizes"),
    "a size of 400 digits": ({"shape": [10**400, 1]}, "shape should be two positive sizes"),
    "another size": ({"shape": [8, 65]}, "should have 260 bytes"),
    "a huge size": ({"shape": [2**40, 2**40]}, "should have 604462909807314587353088 bytes"),
    "negative sizes": ({"shape": [-8, -64]}, "shape should be two positive"),
    "three sizes": ({"shape": [8, 8, 8]}, "shape should be two positive"),
    "no shape": ({"shape": None}, "shape should be two positive"),
    "true as a size": ({"shape": [True, 512]}, "shape should be two positive"),
    "blocks of 32": ({"blocksize": 32}, "blocks of 32 weights cannot be represented.*quantize_model"),
    "blocks of 0": ({"blocksize": 0}, "blocksize should be one of"),
    "blocks of 64.0": ({"blocksize": 64.0}, "blocksize should be one of"),
    "an unhashable block size": ({"blocksize": [64]}, "blocksize should be one of"),
    "an unknown dtype": ({"dtype": "float8"}, "dtype should be in"),
    "an unhashable dtype": ({"dtype": []}, "dtype should be in"),
    "another type than the key's": ({"quant_type": "fp4"}, "quant_type should be 'nf4', as its key says"),
    "an unknown key": ({"scale": 2}, "'scale' is not known"),
    "blocks of 0 codes": ({"nested_blocksize": 0}, "nested_blocksize should be in 1 to 65536"),
    "huge blocks of codes": ({"nested_blocksize": 2**40}, "nested_blocksize should be in 1 to 65536"),
    "an offset of NaN": ({"nested_offset": math.nan}, "nested_offset should be a finite float32"),
    "an offset of 400 digits": ({"nested_offset": 10**400}, "nested_offset should be a finite float32"),
    "an offset in words": ({"nested_offset": "1"}, "nested_offset should be a finite float32"),
    "an unknown nested dtype": ({"nested_dtype": "nn"}, "nested_dtype should be in"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_settings_that_lie(changes, message):
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes_state(with_settings(**changes))


BAD_TEXTS = {
    "no JSON": "{",
    "a list": "[1]",
    "a number": "1",
    "nesting without end": "[" * 60_000,
    "deep nesting": '{"shape":' + "[" * 500 + "]" * 500 + "}",
    "a key twice": '{"blocksize": 64, "blocksize": 128}',
    "nothing": "",
    "too much": " " * 70_000,
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_texts_that_are_no_object(text):
    with pytest.raises(ValueError, match=r"weight\.quant_state"):
        from_bitsandbytes_state(with_text(text))


BAD_TENSORS = {
    "no constants": ({"weight.absmax": None}, "there is no 'weight.absmax'"),
    "no levels": ({"weight.quant_map": None}, "there is no 'weight.quant_map'"),
    "no codes": ({"weight": None}, "there is no 'weight'"),
    "no second level": ({NESTED: None}, "there is no 'weight.nested_absmax'"),
    "no settings": ({QUANT_STATE: None}, "'weight' has no quant_state"),
    "both settings": ({QUANT_STATE[:-3] + "fp4": torch.zeros(1)}, "more than one"),
    "settings of floats": ({QUANT_STATE: torch.zeros(9)}, "should be at most 65536 bytes"),
    "settings without data": ({QUANT_STATE: torch.zeros(9, dtype=torch.uint8, device="meta")}, "with their data"),
    "constants of floats": ({"weight.absmax": torch.ones(8)}, "'weight.absmax' should be 8 x torch.uint8"),
    "too few constants": ({"weight.absmax": torch.zeros(7, dtype=torch.uint8)}, "'weight.absmax' should be 8 x"),
    "too many codes": ({"weight": torch.zeros(257, 1, dtype=torch.uint8)}, "'weight' should have 256 bytes"),
    "complex codes": ({"weight": torch.zeros(32, dtype=torch.complex64)}, "'weight' should have 256 bytes"),
    "other levels": ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "should be the 16 levels of NF4"),
    "levels of NaN": ({"weight.quant_map": torch.full((16,), math.nan)}, "should be the 16 levels of NF4"),
    "levels in float64": ({"weight.quant_map": torch.zeros(16).double()}, "'weight.quant_map' should be 16 x"),
    "a constant of NaN": ({NESTED: torch.tensor([math.nan])}, "NaN or infinity"),
    "constants that overflow": (
        {NESTED: torch.tensor([3e38]), "weight.nested_quant_map": torch.full((256,), 3e38)},
        "overflow",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_do_not_fit(changes, message):
    tensors = {key: tensor for key, tensor in (valid() | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes_state(tensors)


def test_a_second_level_that_the_settings_do_not_know():
    with pytest.raises(ValueError, match=r"'weight\.nested_absmax' belongs to double quantization"):
        from_bitsandbytes_state(valid(double_quant=False) | {NESTED: torch.zeros(1)})


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"'weight\.absmax' should be a tensor, found list"):
        from_bitsandbytes_state(valid() | {"weight.absmax": [1]})


def test_what_bitsandbytes_does_not_know():
    with pytest.raises(ValueError, match="float64"):
        to_bitsandbytes_state(quantize(torch.ones(8, 64)).to(torch.float64))
