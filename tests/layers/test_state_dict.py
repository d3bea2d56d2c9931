"""What a QLinear holds through casts, moves, state dicts and copies."""

from __future__ import annotations

import copy
import io
import pickle

import forked
import pytest
import torch
from safetensors.torch import load, save
from small.layers import K, N, assert_same, dense, frozen_bits, layer
from torch import nn

from qlora_kernels import QLinear

CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to with device": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "there and back": (lambda m: m.half().float(), torch.float32),
    "cpu": (lambda m: m.cpu(), torch.float32),
    "share_memory": (lambda m: m.share_memory(), torch.float32),
}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("cast", CASTS)
def test_casts_never_touch_packed_data(cast, double_quant):
    function, dtype = CASTS[cast]
    model = nn.Sequential(layer(double_quant=double_quant), layer(rank=0), nn.ReLU())
    model[0].merge()
    bits = {key: value.clone() for key, value in model.state_dict().items() if "weight" in key or "merged" in key}
    assert function(model) is model
    state = model.state_dict()
    assert_same({key: state[key] for key in bits}, bits)
    for made in model[:2]:
        assert made.dtype == made.bias.dtype == made.weight.dtype == dtype
    assert model[0].lora_A["default"].dtype == dtype
    assert model[0](torch.randn(2, K, dtype=dtype)).dtype == dtype
    assert model[0].to_linear().weight.dtype == dtype


def test_casts_without_bias_and_adapters_are_remembered():
    made = QLinear.from_linear(dense(bias=False), rank=0).bfloat16()
    assert made.weight.dtype == torch.bfloat16
    assert made.to_linear().weight.dtype == torch.bfloat16
    made.add_adapter("new", rank=2)
    assert made.lora_A["new"].dtype == torch.bfloat16


def test_casts_with_tensor_swapping():
    made = layer()
    bits = frozen_bits(made)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        made.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(frozen_bits(made), bits)
    assert made.lora_A["default"].dtype == torch.float16


# ------------------------------------------------------------------------------------------------ state dicts


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("way", ["copy", "assign", "to_empty", "safetensors", "torch.save"])
def test_state_dict_round_trips(way, double_quant):
    made = layer(double_quant=double_quant)
    state = made.state_dict()
    assert all(type(value) in (torch.Tensor, nn.Parameter) for value in state.values())
    meta = way in ("assign", "to_empty")
    other = QLinear(K, N, rank=4, double_quant=double_quant, device="meta" if meta else None)
    if meta:
        assert all(t.is_meta for t in (*other.parameters(), *other.buffers()))
    if way == "to_empty":
        other.to_empty(device="cpu")
    if way == "safetensors":
        state = load(save({key: value.contiguous() for key, value in state.items()}))
    if way == "torch.save":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    other.load_state_dict(state, strict=True, assign=way == "assign")
    assert_same(other.state_dict(), made.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(other(x), made(x))
    other(x).sum().backward()
    assert other.lora_A["default"].grad is not None


def test_from_linear_on_the_meta_device_makes_shapes():
    made = QLinear.from_linear(nn.Linear(K, N, device="meta"), rank=4)
    assert made.weight.packed.is_meta
    assert made.lora_A["default"].is_meta
    with torch.device("meta"):
        assert QLinear(K, N).weight.packed.is_meta
    made.load_state_dict(layer().state_dict(), assign=True)
    assert made(torch.randn(1, K)).isfinite().all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(duplicate):
    made = layer(dropout=0.25, rslora=True)
    with made.disable_adapters():
        other = duplicate(made)
    assert other.adapters == made.adapters
    assert_same(other.state_dict(), made.state_dict())
    x = torch.randn(2, K)
    assert torch.equal(other.eval()(x), made.eval()(x))
    nn.init.zeros_(other.lora_B["default"])
    assert made.lora_B["default"].any()


def _without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


BAD_STATES = {
    "missing piece": (_without("weight_absmax"), 'no "weight_absmax"'),
    "missing constants": (_without("weight_nested_offset"), 'no "weight_nested_offset"'),
    "missing adapter": (_without("lora_A.default"), r"Missing key.*lora_A\.default"),
    "unexpected": (lambda s: {**s, "surprise": torch.zeros(1)}, "Unexpected key.*surprise"),
    "float packed": (
        lambda s: {**s, "weight_packed": s["weight_packed"].float()},
        '"weight_packed" should be torch.uint8, found torch.float32',
    ),
    "half constants": (
        lambda s: {**s, "weight_nested_absmax": s["weight_nested_absmax"].half()},
        '"weight_nested_absmax" should be torch.float32, found torch.float16',
    ),
    "wrong size": (
        lambda s: {**s, "weight_packed": s["weight_packed"][:-1].clone()},
        r'"weight_packed" of a weight \[72, 100\] should have shape \[3600\], found \[3599\]',
    ),
    "another layer": (lambda s: layer_of(80).state_dict(), r'"weight_packed" of a weight \[72, 100\]'),
    "plain constants": (
        lambda s: {k: v for k, v in layer(double_quant=False).state_dict().items() if "nested" not in k},
        r'no "weight_nested_absmax", .*double_quant=True',
    ),
    "dense": (lambda s: dense().state_dict(), r'"weight" is a dense weight, but the layer is 4-bit.*quantize_model'),
    "another rank": (lambda s: layer(rank=5).state_dict(), r"size mismatch for 0\.lora_A\.default"),
}


def layer_of(k):
    return QLinear(k, N, rank=4)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_state_dicts_are_refused_and_the_base_stays(case, assign):
    change, message = BAD_STATES[case]
    model = nn.Sequential(layer())
    bits, before = frozen_bits(model[0]), model[0].state_dict()
    state = {f"0.{key}": value for key, value in change(before).items()}
    with pytest.raises(RuntimeError, match=message.replace('"weight', '"0.weight')):
        model.load_state_dict(state, assign=assign)
    if "weight" in message:
        assert_same(frozen_bits(model[0]), bits)


def test_a_mixture_of_two_weights_is_refused_without_strict_too():
    made = layer()
    with pytest.raises(RuntimeError, match="incomplete 4-bit weight"):
        made.load_state_dict({"weight_packed": made.state_dict()["weight_packed"]}, strict=False)
    adapters = {key: value + 1 for key, value in made.state_dict().items() if key.startswith("lora")}
    bits = frozen_bits(made)
    made.load_state_dict(adapters, strict=False)
    assert_same(frozen_bits(made), bits)
    assert torch.equal(made.lora_A["default"], adapters["lora_A.default"])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_A.default", torch.randn(3, K), r"size mismatch for 0\.lora_A\.default"),
        ("lora_B.default", torch.zeros(N, 4, dtype=torch.int32), r'"0\.lora_B\.default" should be floating'),
        ("bias", torch.zeros(N + 1), r"size mismatch for 0\.bias"),
        ("weight_absmax", torch.zeros(3), r'"0\.weight_absmax" should be torch.uint8'),
        ("weight_absmax", [1, 2], r'"0\.weight_absmax" should be a tensor, found list'),
    ],
)
def test_a_layer_is_loaded_whole_or_not_at_all(key, value, message, assign):
    model = nn.Sequential(layer())
    merged = layer()
    merged.merge()  # the layer would have to make room for its backup
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {f"0.{name}": tensor for name, tensor in merged.state_dict().items()} | {f"0.{key}": value}
    with pytest.raises(RuntimeError, match=message) as error:
        model.load_state_dict(state, assign=assign)
    assert "Missing key" not in str(error.value)
    assert model[0].merged_adapter_name is None
    assert_same(model.state_dict(), before)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" in name)


def test_a_state_dict_without_data_is_refused():
    made = layer()
    bits = frozen_bits(made)
    state = {**made.state_dict(), "weight_packed": made.weight_packed.detach() * 0}
    with pytest.raises(RuntimeError, match='"weight_absmax" is on the meta device'):
        made.load_state_dict({**state, "weight_absmax": torch.empty_like(made.weight_absmax, device="meta")})
    assert_same(frozen_bits(made), bits)


@pytest.mark.parametrize(
    "key", ["weight_packed", "weight_nested_absmax", "unmerged_nested_table", "bias", "lora_B.default"]
)
def test_a_layer_that_would_be_partly_without_data_is_not_assigned(key):
    made, source = layer(), layer()
    source.merge()
    state = source.state_dict()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with pytest.raises(RuntimeError, match="is on the meta device"):
        made.load_state_dict({**state, key: state[key].to("meta")}, assign=True)
    assert made.merged_adapter_name is None
    assert_same(made.state_dict(), before)
    with pytest.raises(RuntimeError, match=r'"lora_B\.default" is on the meta device, but the 4-bit weight has data'):
        made.load_state_dict({"lora_B.default": state["lora_B.default"].to("meta")}, strict=False, assign=True)
    assert_same(made.state_dict(), before)


def test_a_layer_wholly_without_data_can_be_assigned_and_filled_in_two_steps():
    made, source = layer(), layer()
    made.load_state_dict({name: tensor.to("meta") for name, tensor in made.state_dict().items()}, assign=True)
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    for adapters in (True, False):
        part = {name: tensor for name, tensor in source.state_dict().items() if name.startswith("lora") == adapters}
        made.load_state_dict(part, strict=False, assign=True)
    x = torch.randn(2, K)
    assert torch.equal(made(x), source(x))


def test_zeros_without_memory_can_be_assigned():
    made, other = layer(), layer()
    state = {name: tensor.detach().clone() for name, tensor in made.state_dict().items()}
    state["weight_nested_table"].zero_()
    made.load_state_dict(state)
    other.load_state_dict({**state, "weight_nested_table": torch._efficientzerotensor(256)}, assign=True)
    x = torch.randn(2, K)
    assert torch.equal(other(x), made(x))


@pytest.mark.parametrize("double_quant", [True, False])
def test_pieces_that_are_not_contiguous_can_be_assigned(double_quant):
    made, other = layer(double_quant=double_quant), layer(double_quant=double_quant)
    made.merge()
    state = {
        key: torch.stack((value, value), -1)[..., 0] if value.dim() == 1 else value
        for key, value in made.state_dict().items()
    }
    assert not state["weight_packed"].is_contiguous()
    other.load_state_dict(state, assign=True)
    x = torch.randn(2, K)
    assert torch.equal(other(x), made(x))
    other.unmerge()
    made.unmerge()
    assert torch.equal(other(x), made(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("double_quant", [True, False])
def test_constants_that_are_not_finite_are_not_loaded(assign, double_quant):
    source, target = layer(double_quant=double_quant), layer(double_quant=double_quant)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    for name in ("nested_absmax", "nested_offset", "nested_table") if double_quant else ("absmax",):
        state = {key: value.clone() for key, value in source.state_dict().items()}
        state[f"weight_{name}"][0] = float("nan")
        with pytest.raises(RuntimeError, match=f"'weight_{name}' holds NaN or infinity"):
            target.load_state_dict(state, assign=assign)
        assert_same(target.state_dict(), before)
    merged = layer(double_quant=double_quant)
    merged.merge()
    state = {key: value.clone() for key, value in merged.state_dict().items()}
    state["unmerged_nested_absmax" if double_quant else "unmerged_absmax"][0] = float("inf")
    with pytest.raises(RuntimeError, match=r"'unmerged_.*absmax' holds NaN or infinity"):
        target.load_state_dict(state, assign=assign)
    assert_same(target.state_dict(), before)


def load_freed_memory(assign: bool, key: str) -> int:
    """torch itself reads freed memory when it copies a state dict, and the process ends."""
    target = layer()
    state = {name: value.clone() for name, value in layer().state_dict().items()}
    state[key].untyped_storage().resize_(0)
    try:
        target.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        return 0 if f'"{key}" needs' in str(error) and "it was freed or made smaller" in str(error) else 2
    return 1


@pytest.mark.parametrize("key", ["bias", "weight_packed", "weight_nested_table", "lora_A.default"])
def test_freed_memory_is_not_loaded(key):
    for assign in (False, True):
        process = forked.start(load_freed_memory, assign, key)
        process.join()
        assert process.exitcode == 0


@pytest.mark.parametrize("assign", [False, True])
def test_sparse_tensors_are_not_loaded(assign):
    target = layer()
    state = {key: value.clone() for key, value in target.state_dict().items()}
    for key in state:
        with pytest.raises(RuntimeError, match=rf'"{key}" should be a dense tensor, found torch\.sparse_coo'):
            target.load_state_dict({**state, key: state[key].to_sparse()}, assign=assign)
    assert_same(target.state_dict(), state)
