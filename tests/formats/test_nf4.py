"""NF4Weight: its size and error, moves, files, and what it shares with a frozen parameter."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels import NF4Weight, dequantize, quantize


def test_storage_and_error_of_a_normal_weight():
    weight = torch.randn(1024, 1024)
    quantized, single_quant = quantize(weight), quantize(weight, double_quant=False)
    assert quantized.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert round(quantized.bits_per_weight, 3) == 4.127
    assert single_quant.bits_per_weight == 4.5
    assert quantized.nbytes == quantized.numel() // 2 + 1024 * 16 + 4 * (64 + 1)
    # PEERS: 0.09198 with float32 constants, 0.09207 with E4M3 ones.
    for result, error in ((single_quant, 0.09198), (quantized, 0.09207)):
        relative_error = ((result.dequantize() - weight).norm() / weight.norm()).item()
        assert relative_error == pytest.approx(error, rel=0.003)


def test_properties_and_moves():
    weight = quantize(torch.randn(6, 64, dtype=torch.bfloat16))
    assert weight.shape == (6, 64)
    assert weight.dtype == torch.bfloat16
    assert weight.device.type == "cpu"
    assert all(type(piece) is torch.Tensor for piece in weight.pieces)
    assert weight.to(torch.float16).dequantize().dtype == torch.float16
    assert weight.to("cpu").packed.data_ptr() == weight.packed.data_ptr()
    assert dequantize(weight, torch.float64).dtype == torch.float64
    meta = weight.to("meta")
    assert meta.device.type == "meta"
    assert meta.dequantize().shape == (6, 64)
    assert "4." in repr(weight)


@pytest.mark.parametrize("double_quant", [True, False])
def test_safetensors_round_trip(tmp_path, double_quant):
    weight = quantize(torch.randn(10, 100, dtype=torch.bfloat16), double_quant)
    weight.save(tmp_path / "w.safetensors")
    loaded = NF4Weight.load(tmp_path / "w.safetensors")
    assert loaded.shape == weight.shape
    assert loaded.dtype == weight.dtype
    assert torch.equal(loaded.dequantize(), weight.dequantize())
    again = NF4Weight.from_state_dict(weight.state_dict("layer."), "layer.")
    assert torch.equal(again.dequantize(), weight.dequantize(torch.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_files_that_are_not_weights(tmp_path):
    from safetensors.torch import save_file

    weight = quantize(torch.randn(10, 64))
    weight.save(tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-50])
    (tmp_path / "text.safetensors").write_text("not a tensor in sight")
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    state = weight.state_dict()
    save_file({**state, "packed": state["packed"][:-1].clone()}, tmp_path / "short.safetensors")
    for name in ("cut", "text", "foreign", "short"):
        with pytest.raises(ValueError, match=r"safetensors|NF4|elements"):
            NF4Weight.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        NF4Weight.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("name", ["torch.nn", "torch.int32", "torch.nothing", "float32", ""])
def test_a_file_with_another_dtype_is_refused(tmp_path, name):
    from safetensors.torch import save_file

    path = tmp_path / "weight.safetensors"
    save_file(quantize(torch.randn(4, 64)).state_dict(), path, metadata={"dtype": name})
    with pytest.raises(ValueError, match=rf"weight\.safetensors: the dtype .* torch\.float64, found '{name}'"):
        NF4Weight.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_files_keep_the_dtype(tmp_path, dtype):
    path = tmp_path / "weight.safetensors"
    quantize(torch.randn(4, 64)).to(dtype).save(path)
    assert NF4Weight.load(path).dtype == dtype


def test_a_weight_can_be_inspected_like_a_frozen_parameter():
    weight = quantize(torch.randn(4, 64))
    assert weight.is_floating_point()
    assert not weight.is_meta
    assert not weight.is_cuda
    assert weight.grad is None
    assert weight.to("meta").is_meta
    with pytest.raises(RuntimeError, match=r"frozen and 4-bit .* dequantize\(\).*from_linear"):
        _ = weight.data
    with pytest.raises((RuntimeError, AttributeError)):
        weight.data = torch.zeros(4, 64)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_constants_that_are_not_finite_are_refused(tmp_path, double_quant, value):
    from safetensors.torch import save_file

    state = quantize(torch.randn(10, 64), double_quant).state_dict("w.")
    assert NF4Weight.from_state_dict(state, "w.").double_quant == double_quant
    for name in ("w.nested_absmax", "w.nested_offset", "w.nested_table") if double_quant else ("w.absmax",):
        bad = {key: tensor.clone() for key, tensor in state.items()}
        bad[name][-1] = value
        with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity"):
            NF4Weight.from_state_dict(bad, "w.")
        save_file({key.removeprefix("w."): tensor for key, tensor in bad.items()}, tmp_path / "bad")
        with pytest.raises(ValueError, match=f"bad: '{name[2:]}' holds NaN or infinity"):
            NF4Weight.load(tmp_path / "bad")
        NF4Weight.from_state_dict(
            {key: tensor.to("meta") if "shape" not in key else tensor for key, tensor in bad.items()}, "w."
        )


def test_constants_that_overflow_together_are_refused():
    state = quantize(torch.randn(10, 64)).state_dict()
    state["nested_absmax"].fill_(3e38)
    state["nested_offset"].fill_(3e38)
    state["absmax"].zero_()  # entry 0 of the table is 0
    assert NF4Weight.from_state_dict(state).dequantize().isfinite().all()
    state["absmax"][3] = 126  # 1, the largest
    assert (
        not NF4Weight(**{k: v for k, v in state.items() if k != "shape"}, shape=torch.Size((10, 64)))
        .dequantize()
        .isfinite()
        .all()
    )
    with pytest.raises(ValueError, match=r"'nested_absmax' holds 3e.38, with which the weight's constants overflow"):
        NF4Weight.from_state_dict(state)


@pytest.mark.parametrize("name", ["packed", "absmax", "nested_absmax", "nested_offset", "nested_table", "shape"])
def test_pieces_that_are_no_dense_tensors_with_memory_are_refused(name):
    state = quantize(torch.randn(10, 64)).state_dict()
    freed = state[name].clone()
    freed.untyped_storage().resize_(0)
    for bad, raised, message in (
        (5, TypeError, "should be a tensor, found int"),
        (state[name].to_sparse(), ValueError, "should be a dense tensor, found torch.sparse_coo"),
        (freed, RuntimeError, "it was freed or made smaller"),
    ):
        with pytest.raises(raised, match=f"'{name}' .*{message}"):
            NF4Weight.from_state_dict({**state, name: bad})
    with pytest.raises(ValueError, match=r"'shape' should be int64 \[2\] with its data, found .* on meta"):
        NF4Weight.from_state_dict({**state, "shape": state["shape"].to("meta")})
