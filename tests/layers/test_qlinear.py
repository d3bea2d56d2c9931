"""QLinear as a module: construction and the forward pass."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from contract import relative_error
from small.layers import K, N, assert_same, dense, frozen_bits, layer
from torch import nn

import qlora_kernels
from qlora_kernels import NF4Weight, QLinear

# ------------------------------------------------------------------------------------------------ construction


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_constant_that_double_quantization_rounds_to_infinity_is_refused(dtype):
    linear, limit = nn.Linear(64, 8, dtype=dtype), torch.finfo(dtype).max
    # One group of eight blocks: its largest distance from the mean is downwards, so that no table entry is the largest.
    scales = torch.tensor([1.0, 1.0, 0.995, 0.99, 1.0, 0.98, 0.97, 0.0], dtype=torch.float64)
    refused = 0
    for share in (0.9, 0.96, 0.99, 1.0):
        with torch.no_grad():
            linear.weight.copy_((scales * share * limit).unsqueeze(1).expand(8, 64))
        quantized = qlora_kernels.quantize(linear.weight)
        if quantized.dequantize().isfinite().all():
            assert QLinear.from_linear(linear, rank=0).weight.dequantize().isfinite().all()
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"up holds values so near the largest torch\..*use double_quant=False"):
            QLinear.from_linear(linear, rank=0, name="up")
        assert share > 0.96
    assert refused
    single_quant = QLinear.from_linear(linear, rank=0, double_quant=False)
    assert single_quant.weight.dequantize().isfinite().all()


def test_passes_for_nn_linear():
    made = QLinear(K, N)
    assert isinstance(made, nn.Linear)
    assert (made.in_features, made.out_features) == (K, N)
    assert made.bias.shape == (N,)
    assert QLinear(K, N, False).bias is None
    assert isinstance(made.weight, NF4Weight)
    assert made.weight.shape == (N, K)
    assert made.weight.dtype == torch.float32
    assert made.weight.device == made.bias.device
    assert "weight" not in dict(made.named_parameters())
    assert repr(made).startswith(
        "QLinear(\n  in_features=100, out_features=72, bias=True, bits=4.134, rank=16, alpha=16, dropout=0.0"
    )


def test_random_init_has_the_scale_of_nn_linears():
    made = QLinear(256, 512)
    bound = 1 / math.sqrt(256)
    values = made.weight.dequantize()
    assert values.abs().max() <= bound * 1.01  # the second level rounds the constants
    assert abs(values.std().item() / (bound / math.sqrt(3)) - 1) < 0.05
    assert made.bias.abs().max() <= bound
    before = values.clone()
    made.reset_parameters()
    assert not torch.equal(made.weight.dequantize(), before)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_linear_is_the_quantized_base_at_the_start(dtype, double_quant):
    linear = dense(dtype=dtype).eval()
    made = QLinear.from_linear(linear, rank=4, double_quant=double_quant)
    quantized = qlora_kernels.quantize(linear.weight, double_quant)
    for piece, wanted in zip(made.weight.pieces, quantized.pieces, strict=True):
        assert wanted is None if piece is None else torch.equal(piece, wanted)
    assert torch.equal(made.bias, linear.bias)
    assert made.bias.data_ptr() != linear.bias.data_ptr()
    assert not made.training
    assert made.dtype == made.lora_A["default"].dtype == dtype
    x = torch.randn(3, K, dtype=dtype)
    assert torch.equal(made(x), qlora_kernels.linear(x, quantized, linear.bias))
    assert relative_error(made(x), F.linear(x, quantized.dequantize(), linear.bias).double()) < 1e-2


def test_the_adapter_starts_as_in_the_paper():
    made = QLinear(256, 128, rank=8, alpha=32)
    A, B = made.lora_A["default"], made.lora_B["default"]
    assert A.shape == (8, 256)
    assert B.shape == (128, 8)
    assert not B.any()
    bound = 1 / math.sqrt(256)  # Kaiming-uniform with a = sqrt(5)
    assert bound * 0.98 < A.abs().max() <= bound
    assert (made.rank, made.scaling) == (8, 4.0)
    assert QLinear(256, 128, rank=16, alpha=32, rslora=True).scaling == 8.0
    assert A.requires_grad
    assert B.requires_grad


def test_rank_0_is_a_plain_4_bit_layer():
    made = QLinear(K, N, rank=0)
    assert (made.rank, made.scaling, made.active_adapter, made.adapters) == (0, 0.0, None, {})
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["bias"]
    made(torch.randn(2, K)).sum().backward()
    assert torch.allclose(made.bias.grad, torch.full((N,), 2.0))


def test_bias_keeps_whether_it_trains():
    linear = dense()
    linear.bias.requires_grad_(False)
    assert not QLinear.from_linear(linear).bias.requires_grad
    assert QLinear.from_linear(dense()).bias.requires_grad


def test_adapters_may_be_float32_masters():
    made = QLinear.from_linear(dense(dtype=torch.bfloat16), rank=4, adapter_dtype=torch.float32)
    assert made.lora_A["default"].dtype == torch.float32
    made.add_adapter("more", rank=2)
    assert made.lora_B["more"].dtype == torch.float32
    y = made(torch.randn(3, K, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert made.lora_B["default"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "raised", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features should be positive, found 0"),
        ({"out_features": -3}, ValueError, "out_features should be positive, found -3"),
        ({"rank": -1}, ValueError, "rank should be 0 .* or more, found -1"),
        ({"rank": 73}, ValueError, r"rank 73 is larger than the layer: a weight \[72, 100\] takes at most 72"),
        ({"rank": 2.0}, TypeError, "rank should be an int, found 2.0"),
        ({"alpha": 0}, ValueError, "alpha should be positive and finite, found 0"),
        ({"alpha": -1.0}, ValueError, "alpha"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"alpha": math.inf}, ValueError, "alpha"),
        ({"dropout": 1.0}, ValueError, r"dropout should be in \[0, 1\), found 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dropout": math.nan}, ValueError, "dropout"),
        ({"dtype": torch.int8}, TypeError, "dtype should be one of .*: torch.int8"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype should be one of"),
    ],
)
def test_bad_arguments(options, raised, message):
    with pytest.raises(raised, match=message):
        QLinear(**{"in_features": K, "out_features": N, **options})
    if options.keys() & {"in_features", "out_features"}:
        return
    with pytest.raises(raised, match=message):
        QLinear.from_linear(dense(), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_weight_is_refused_by_name(value):
    linear = dense()
    with torch.no_grad():
        linear.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"q_proj\.weight holds -?(nan|inf) at index \(3, 5\)"):
        QLinear.from_linear(linear, name="q_proj.weight")


@pytest.mark.parametrize("wrong", [nn.Conv1d(1, 1, 1), torch.randn(3, 3), QLinear(8, 8, rank=1)])
def test_from_linear_takes_dense_linears_alone(wrong):
    with pytest.raises(TypeError, match=r"takes a dense nn\.Linear, found"):
        QLinear.from_linear(wrong)


def test_a_float64_weight_is_refused_but_the_layer_may_become_float64():
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16 .*found torch.float64"):
        QLinear.from_linear(dense(dtype=torch.float64))
    assert QLinear(K, N, dtype=torch.float64)(torch.randn(1, K, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("value", [torch.randn(N, K), nn.Parameter(torch.randn(N, K)), None])
def test_the_weight_cannot_be_assigned_or_trained(value):
    made = layer()
    bits = frozen_bits(made)
    with pytest.raises(AttributeError, match=r"QLinear\.from_linear"):
        made.weight = value
    with pytest.raises(RuntimeError, match="frozen"):
        made.weight.requires_grad_()
    with pytest.raises(TypeError, match="linear was given an NF4Weight, which is not a tensor; call the layer"):
        F.linear(torch.randn(1, K), made.weight)
    assert_same(frozen_bits(made), bits)


# ------------------------------------------------------------------------------------------------ the product


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_floating_input_gives_its_own_dtype(dtype, x_dtype):
    made = layer().to(dtype)
    x = torch.randn(2, 3, K).to(x_dtype)
    y = made(x)
    assert y.dtype == x_dtype
    exact = copy.deepcopy(made).double()(x.double())
    assert relative_error(y, exact) < 1e-2
    y.double().sum().backward()
    assert made.lora_A["default"].grad.dtype == made.bias.grad.dtype == dtype


def test_inputs_and_modes_of_nn_linear():
    made = layer()
    as_linear = made.to_linear()
    x = torch.randn(4, 2, K)
    for view in (x, x[:, 0], x.transpose(0, 1), x[0, 0], x[:0], x[..., :0, :]):
        assert made(view).shape == as_linear(view).shape
        assert torch.allclose(made(view), as_linear(view), atol=1e-5)
    with torch.no_grad():
        assert not made(x).requires_grad
    with torch.inference_mode():
        assert made(x).is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x should be \[\.\.\., 100\]"):
        made(torch.randn(2, K + 1))
    with pytest.raises(TypeError, match=r"found torch\.int64"):
        made(torch.ones(2, K, dtype=torch.int64))


def test_dropout_acts_in_training_alone_and_on_the_adapter_alone():
    made = layer(dropout=0.5)
    x = torch.randn(3, K)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    made.train()
    nn.init.zeros_(made.lora_B["default"])
    assert torch.equal(made(x), made(x))


def test_dropout_keeps_the_mean():
    made = layer(dropout=0.5)
    x = torch.randn(1, K)
    with torch.no_grad():
        mean = made(x.expand(4000, K)).mean(0, keepdim=True)  # every row has a mask of its own
        assert relative_error(mean, made.eval()(x).double()) < 0.03


def test_training_moves_the_adapter_and_nothing_else():
    made = layer()
    bits = frozen_bits(made)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.02, weight_decay=0.1)  # all parameters: frozen ones stay
    x, target = torch.randn(64, K), torch.randn(64, N)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(made(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert_same(frozen_bits(made), bits)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_without_graph_breaks(dropout):
    made = layer(dropout=dropout)
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, K, requires_grad=True)
    results = []
    for function in (made, compiled):
        made.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        y = function(x)
        y.square().sum().backward()
        results.append([y, x.grad, made.lora_A["default"].grad, made.lora_B["default"].grad, made.bias.grad])
    for eager, other in zip(*results, strict=True):
        assert torch.allclose(eager, other, rtol=1e-5, atol=1e-6)


def test_a_layer_without_data_cannot_be_merged():
    made = QLinear(K, N, rank=4, device="meta")
    with pytest.raises(RuntimeError, match="on the meta device and has no data to merge"):
        made.merge()
    assert made.merged_adapter_name is None


def test_what_is_cached_for_a_weight_goes_with_it():
    made, x = layer(), torch.randn(2, K)
    expected = made(x)
    kept = made._operand()
    assert made._operand() is kept
    copied = copy.deepcopy(made)
    assert torch.equal(copied(x), expected)
    assert copied._operand() is not kept
    assert all(a is not b for a, b in zip(copied._operand().pieces, kept.pieces, strict=True))
    for change in (made.merge, made.unmerge, made.double, made.reset_parameters):
        made._operand()
        change()
        assert "_kept_operand" not in vars(made), change
    other = layer()
    assert torch.equal(torch.func.functional_call(copied, dict(other.state_dict()), (x,)), other(x))
    assert torch.equal(copied(x), expected)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_nothing_complex_loses_its_imaginary_part():
    linear = dense()
    linear.bias = nn.Parameter(torch.randn(N, dtype=torch.complex64))
    made = layer()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    for call in (
        lambda: QLinear.from_linear(linear),
        lambda: QLinear.from_nf4(made.weight, linear.bias),
        lambda: made.to(torch.complex64),
    ):
        with pytest.raises(TypeError, match=r"complex64"):
            call()
    assert_same(made.state_dict(), before)
    for name, owner in (("bias", made), ("default", made.lora_A)):
        kept = getattr(owner, name)
        setattr(owner, name, nn.Parameter(kept.to(torch.complex64)))
        with pytest.raises(TypeError, match=r"(bias|lora_A) should be real, found torch\.complex64"):
            made(torch.randn(2, K, dtype=torch.bfloat16))
        setattr(owner, name, kept)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_layer_computes_and_trains_as_the_layer(trained):
    made = layer()
    if not trained:
        made.requires_grad_(False)
    x = torch.randn(2, 3, K, requires_grad=True)
    traced = torch.jit.trace(made, (x,))
    gradients = []
    for forward in (made, traced):
        x.grad = None
        made.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        gradients.append([y, *(p.grad for p in (x, *made.parameters()) if p.grad is not None)])
    assert len(gradients[0]) == (5 if trained else 2)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    assert torch.equal(torch.jit.load(stored)(x), made(x))
