"""The behaviour of `linear` under autograd: gradients, what is saved, autocast, checkpointing, odd inputs."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import qlora_kernels
from qlora_kernels import linear, quantize
from qlora_kernels.ops import dispatcher
from qlora_kernels.ops import linear as fused
from qlora_kernels.ops.backends import reference

N, K, R = 72, 100, 4  # K is no multiple of 64, so that blocks straddle rows
SCALING = 0.7


@pytest.fixture(scope="module")
def weight():
    torch.manual_seed(0)
    return qlora_kernels.quantize(torch.randn(N, K) / math.sqrt(K))


def leaves(m=5, dtype=torch.float32, adapter_dtype=None):
    """x, bias, A, B, all asking for gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((m, K), (N,), (R, K), (N, R))
    tensors = [torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for shape in shapes]
    dtypes = (dtype, dtype, adapter_dtype or dtype, adapter_dtype or dtype)
    return [tensor.to(d).requires_grad_() for tensor, d in zip(tensors, dtypes, strict=True)]


def exact(weight, x, bias, A, B, scaling, dropout=0.0, seed=None):
    """Plain torch in float64, over the dequantized weight."""
    W = weight.dequantize(torch.float64)
    x, bias, A, B = (t.double() for t in (x, bias, A, B))
    dropped = x * reference.dropout_mask(x.shape[0], K, dropout, seed) / (1 - dropout)
    return F.linear(x, W, bias) + scaling * (dropped @ A.T) @ B.T


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "tolerance"),
    [
        (torch.float64, None, 1e-6),
        (torch.float32, None, 1e-5),
        (torch.bfloat16, None, 1e-2),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.float16, None, 2e-3),
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_plain_torch(weight, dtype, adapter_dtype, tolerance, dropout):
    tensors = leaves(37, dtype, adapter_dtype)
    seed = torch.tensor([-12345678901234])
    dy = torch.randn(37, N).to(dtype)
    y = linear(tensors[0], weight, *tensors[1:], scaling=SCALING, dropout=dropout, seed=seed)
    grads = torch.autograd.grad(y, tensors, dy)
    y64 = exact(weight, *tensors, SCALING, dropout, seed)
    expected = torch.autograd.grad(y64, tensors, dy.double())
    assert y.dtype == dtype
    assert error(y, y64) < tolerance
    for name, tensor, grad, wanted in zip(("x", "bias", "A", "B"), tensors, grads, expected, strict=True):
        assert grad.dtype == tensor.dtype, name
        assert grad.shape == tensor.shape, name
        assert error(grad, wanted) < tolerance, name


@pytest.mark.parametrize("adapter", [True, False])
def test_gradcheck(adapter):
    weight = qlora_kernels.quantize(torch.randn(7, 11))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 11), 7, (2, 11), (7, 2))]
    seed = torch.tensor([7])
    assert torch.autograd.gradcheck(
        lambda x, *rest: linear(x, weight, *rest, scaling=SCALING, dropout=0.3, seed=seed),
        tensors if adapter else tensors[:2],
    )


def test_a_second_derivative_is_an_error(weight):
    x, *rest = leaves()
    (grad,) = torch.autograd.grad(linear(x, weight, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"qlora_kernels.*second derivative"):
        grad.sum().backward()


def test_a_gradient_of_the_weight_is_an_error(weight):
    assert weight.requires_grad is False
    with pytest.raises(RuntimeError, match="frozen"):
        weight.requires_grad_()
    with pytest.raises(RuntimeError, match="frozen"):
        weight.requires_grad = True
    constants = weight.nested_absmax.clone().requires_grad_()
    asking = qlora_kernels.NF4Weight(*weight.pieces[:2], constants, *weight.pieces[3:], weight.shape)
    with pytest.raises(RuntimeError, match="nested_absmax asks for one"):
        linear(torch.randn(2, K), asking)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_neither_a_dense_weight_nor_a_dropped_copy_of_x_is_saved(weight, dropout):
    x, *rest = leaves(64)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(x, weight, *rest, scaling=SCALING, dropout=dropout)
    pieces = {piece.data_ptr() for piece in weight.pieces}
    own = [tensor for tensor in saved if tensor.data_ptr() not in pieces]
    assert all(tensor.numel() < N * K for tensor in own)
    # x, U, A, B, and with dropout the seed: an element
    assert sum(tensor.numel() for tensor in own) == 64 * K + 64 * R + R * K + N * R + (dropout > 0)


@pytest.mark.parametrize("needed", range(4))
def test_only_the_gradients_asked_for_are_computed(weight, monkeypatch, needed):
    tensors = [t.detach().requires_grad_(i == needed) for i, t in enumerate(leaves())]
    calls = []
    original = fused.backward

    def spy(*args):
        calls.append(args[-1])
        return original(*args)

    monkeypatch.setattr(fused, "backward", spy)
    linear(tensors[0], weight, *tensors[1:]).sum().backward()
    assert [t.grad is not None for t in tensors] == [i == needed for i in range(4)]
    assert calls == {0: [(True, False, False)], 1: [], 2: [(False, True, False)], 3: [(False, False, True)]}[needed]


def test_frozen_inputs_need_no_x_in_backward(weight):
    x, bias, A, B = leaves(64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, bias.detach(), A.detach(), B.detach())
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in saved)


def test_adapters_that_differ_in_whether_they_train(weight):
    x, bias, A, B = leaves()
    y = linear(x.detach(), weight, bias.detach(), A, B.detach(), scaling=SCALING)
    y.sum().backward()
    full = torch.autograd.grad(exact(weight, x, bias, A, B, SCALING).sum(), A)[0]
    assert error(A.grad, full) < 1e-5
    assert B.grad is None


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((K,), lambda x: x),
        ((2, 3, K), lambda x: x),
        ((2, 1, 3, K), lambda x: x),
        ((K, 6), lambda x: x.t()),
        ((3, K, 2), lambda x: x.transpose(1, 2)),
        ((4, 2 * K), lambda x: x[:, ::2]),
        ((1, K), lambda x: x.expand(5, K)),
    ],
    ids=["1-d", "3-d", "4-d", "transposed", "transposed 3-d", "strided", "expanded"],
)
def test_shapes_and_strides_are_taken_as_by_nn_linear(weight, shape, view):
    _, bias, A, B = leaves()
    x = torch.randn(shape, requires_grad=True)
    W = weight.dequantize()
    y = linear(view(x), weight, bias, A, B, scaling=SCALING)
    dense = F.linear(view(x), W, bias) + SCALING * F.linear(F.linear(view(x), A), B)
    assert y.shape == dense.shape
    assert error(y, dense) < 1e-5
    dy = torch.randn_like(dense).transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous either
    for grad, wanted in zip(
        torch.autograd.grad(y, (x, bias, A, B), dy), torch.autograd.grad(dense, (x, bias, A, B), dy), strict=True
    ):
        assert grad.shape == wanted.shape
        assert error(grad, wanted) < 1e-5


@pytest.mark.parametrize("shape", [(0, K), (3, 0, K)])
def test_no_rows(weight, shape):
    _, bias, A, B = leaves()
    x = torch.randn(shape, requires_grad=True)
    y = linear(x, weight, bias, A, B, dropout=0.5)
    assert y.shape == (*shape[:-1], N)
    y.sum().backward()
    assert x.grad.shape == shape
    for tensor in (bias, A, B):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight, dtype, adapter_dtype):
    x, bias, A, B = leaves(9, torch.float32, adapter_dtype)
    with torch.autocast("cpu", dtype):
        y = linear(x, weight, bias, A, B, scaling=SCALING)
        dense = F.linear(x, weight.dequantize(), bias)
    assert y.dtype == dense.dtype == dtype
    expected = exact(weight, x, bias, A, B, SCALING)
    assert error(y, expected) < 1e-2
    y.float().square().sum().backward()
    grads = torch.autograd.grad(expected.square().sum(), (x, bias, A, B))
    for tensor, grad in zip((x, bias, A, B), grads, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert error(tensor.grad, grad) < 2e-2
    with torch.autocast("cpu", dtype):
        assert linear(x.double(), weight, bias, A.float(), B.float()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert linear(x, weight, bias).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(weight, reentrant):
    def run(wrap):
        tensors = leaves(8)
        torch.manual_seed(3)
        y = wrap(lambda x: linear(torch.tanh(x), weight, *tensors[1:], scaling=SCALING, dropout=0.5), tensors[0])
        y.square().sum().backward()
        return [y, *(tensor.grad for tensor in tensors)]

    unwrapped = run(lambda f, x: f(x))
    again = run(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(unwrapped, again, strict=True))


def test_dropout_follows_torchs_generator(weight):
    x, bias, A, B = leaves()

    def draw(**options):
        return linear(x, weight, bias, A, B, dropout=0.5, **options)

    torch.manual_seed(11)
    first, second = draw(), draw()
    torch.manual_seed(11)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    assert torch.equal(draw(seed=torch.tensor([5])), draw(seed=torch.tensor([5])))
    assert not torch.equal(draw(seed=torch.tensor([5])), draw(seed=torch.tensor([5 + 2**32])))


def test_no_seed_is_drawn_without_dropout(weight):
    x, bias, A, B = leaves()
    state = torch.get_rng_state()
    linear(x, weight, bias, A, B)
    linear(x, weight, bias, dropout=0.5)  # no adapter, so nothing to drop
    assert torch.equal(torch.get_rng_state(), state)


def test_no_grad_and_inference_mode(weight):
    x, *rest = leaves()
    expected = linear(x, weight, *rest)
    with torch.no_grad():
        y = linear(x, weight, *rest)
    assert not y.requires_grad
    assert torch.equal(y, expected)
    with torch.inference_mode():
        y = linear(x, weight, *rest)
    assert y.is_inference()
    assert torch.equal(y, expected)


def test_the_same_bits_from_run_to_run(weight):
    def run():
        tensors = leaves(33, torch.bfloat16)
        y = linear(tensors[0], weight, *tensors[1:], dropout=0.1, seed=torch.tensor([1]))
        return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradients_accumulate_and_the_graph_may_be_kept(weight):
    x, bias, A, B = leaves()
    y = linear(x, weight, bias, A, B)
    y.sum().backward(retain_graph=True)
    once = A.grad.clone()
    y.sum().backward()
    assert torch.equal(A.grad, 2 * once)


@pytest.mark.parametrize(
    ("change", "raised", "message"),
    [
        ({"x": torch.randn(3, K + 1)}, ValueError, rf"x should be \[\.\.\., {K}\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x should be"),
        ({"x": torch.ones(3, K, dtype=torch.int64)}, TypeError, "x should be bfloat16.*found torch.int64"),
        ({"bias": torch.randn(N + 1)}, ValueError, rf"bias should be \[{N}\]"),
        ({"bias": torch.randn(N).half()}, TypeError, "bias should be torch.float32"),
        ({"lora_A": None}, ValueError, "come together"),
        ({"lora_A": torch.randn(R, K + 1)}, ValueError, "lora_A should be"),
        ({"lora_A": torch.randn(R + 1, K)}, ValueError, "lora_B should be"),
        ({"lora_B": torch.randn(R, N)}, ValueError, "lora_B should be"),
        ({"lora_B": torch.randn(N, R).half()}, TypeError, "lora_B should be torch.float32"),
        ({"dropout": 1.0}, ValueError, "dropout should be in"),
        ({"dropout": -0.1}, ValueError, "dropout should be in"),
        ({"dropout": math.nan}, ValueError, "dropout should be in"),
        ({"dropout": 0.5, "seed": torch.tensor([1.0])}, ValueError, "int64"),
        ({"lora_A": torch.randn(R, K, device="meta")}, ValueError, "lora_A is on meta, but the weight on cpu"),
    ],
)
def test_bad_input(weight, change, raised, message):
    x, bias, A, B = (t.detach() for t in leaves())
    arguments = {"x": x, "weight": weight, "bias": bias, "lora_A": A, "lora_B": B} | change
    with pytest.raises(raised, match=message):
        linear(**arguments)


def test_a_forward_mode_derivative_is_an_error():
    weight = qlora_kernels.quantize(torch.randn(6, 64))
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda t: linear(t, weight), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        linear(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), weight)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.view(2, 3, -1)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients_under_torch_func_are_an_error(weight, transform):
    _, _, A, B = leaves()
    with pytest.raises(RuntimeError, match=r"qlora_kernels\.linear has no gradients under the transforms"):
        transform(lambda x: linear(x, weight, None, A, B), torch.randn(6, weight.shape[1]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_works_under_torch_func(weight):
    x, bias, A, B = leaves(6)
    with torch.no_grad():
        batched = torch.func.vmap(lambda x: linear(x, weight, bias, A, B))(x.view(2, 3, -1))
        torch.testing.assert_close(batched, linear(x, weight, bias, A, B).view(2, 3, -1))
    layer = qlora_kernels.QLinear.from_nf4(weight, rank=4)
    doubled = {name: 2 * value for name, value in layer.named_parameters() if "lora" in name}
    expected = linear(x, weight, None, doubled["lora_A.default"], doubled["lora_B.default"], scaling=layer.scaling)
    assert torch.equal(torch.func.functional_call(layer, doubled, (x,)), expected)


class Watched(torch.Tensor):
    """A subclass that records the operations it takes part in."""

    seen: ClassVar[set[str]] = set()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.add(func.name())
        with no_dispatch():
            return func(*args, **(kwargs or {}))


def test_the_dispatcher_is_skipped_only_where_it_is_idle(weight, monkeypatch):
    """Modes and subclasses still see the operations, and results stay the same."""
    names = {"qlora_kernels::linear_forward", "qlora_kernels::linear_backward"}
    called = []

    def watched(*arguments, is_idle=dispatcher.is_idle):
        called.append(is_idle(*arguments))
        return called[-1]

    monkeypatch.setattr(dispatcher, "is_idle", watched)
    tensors = leaves()

    def run(x=tensors[0]):
        y = linear(x, weight, *tensors[1:])
        (gradient,) = torch.autograd.grad(y.sum(), tensors[2])
        return y.detach(), gradient

    expected = run()
    assert called == [True, True], "past the dispatcher"

    class Modes(TorchDispatchMode):
        seen: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.name())
            return func(*args, **(kwargs or {}))

    with Modes():
        results = [run()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results.append(run())
    with FlopCounterMode(display=False):
        results.append(run())
    for seen in (Modes.seen, {event.name for event in profile.events()}):
        assert names <= seen
    with torch.no_grad():
        linear(torch.randn(5, K).as_subclass(Watched), weight)
        traced = torch.jit.trace(lambda x: linear(x, weight), tensors[0].detach(), check_trace=False)
        graph = make_fx(lambda x: linear(x, weight))(tensors[0].detach())
    assert "qlora_kernels::linear_forward" in Watched.seen
    assert "qlora_kernels::linear_forward" in str(traced.graph)
    assert any("qlora_kernels.linear_forward" in str(node.target) for node in graph.graph.nodes)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert not any(called[2:]), "past those who watch"


def test_the_seed_of_dropout_lies_with_x():
    weight = quantize(torch.randn(8, 64))
    x, A, B = torch.randn(3, 64), torch.randn(2, 64), torch.randn(8, 2)
    with pytest.raises(ValueError, match="the seed is on meta, but the weight on cpu"):
        linear(x, weight, None, A, B, dropout=0.5, seed=torch.zeros(1, dtype=torch.int64, device="meta"))
    torch.manual_seed(3)
    expected = linear(x, weight, None, A, B, dropout=0.5)
    torch.manual_seed(3)
    with torch.device("meta"):
        y = linear(x, weight, None, A, B, dropout=0.5)
    assert torch.equal(y, expected)


def test_a_dense_weight_is_refused():
    with pytest.raises(TypeError, match=r"weight should be an NF4Weight, as quantize\(\) gives, found Tensor"):
        linear(torch.randn(3, 64), torch.randn(8, 64))


def test_a_tensor_that_has_outlived_a_transform(weight):
    _, bias, A, B = leaves()
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(x := torch.randn(3, K))
    assert torch.equal(linear(left[0], weight, bias, A, B), linear(x, weight, bias, A, B))


def test_a_second_backward_after_the_first_is_torchs_error(weight):
    x, bias, A, B = leaves()
    for y in (linear(x, weight), linear(x, weight, bias, A, B)):
        y.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.sum().backward()
