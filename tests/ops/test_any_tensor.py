"""Operations on every kind of tensor that torch has: its answer, or an exception, and never a crash.

More cases than here, from a seed of one's own: ``python tests/support/any_tensor.py SEED FIRST LAST``.
"""

import random

import any_tensor
import pytest
import torch
from attacks import attack

import qlora_kernels as qk


def test_a_fixed_sample_of_cases():
    assert not attack(any_tensor, seed=1, first=0, last=600)


@pytest.mark.slow
def test_cases_of_a_new_seed():
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    problems = attack(any_tensor, seed, 0, 20_000)
    assert not problems, f"seed {seed}: {problems}"


def test_the_cases_reach_every_kind():
    cases = [any_tensor.make_case(random.Random(f"1:{i}")) for i in range(600)]
    twists = {twist for case in cases for twist in case.twists.values()}
    assert twists == any_tensor.ANYTHING.keys() | any_tensor.SAME_VALUES.keys()
    assert {case.operation for case in cases} == set(any_tensor.OPERATIONS)


@pytest.mark.parametrize(
    ("name", "twist", "problem"),
    [("x", "freed storage", "torch has none"), ("lora_A", "not finite", "finite in other places")],
)
def test_a_wrong_answer_is_found(monkeypatch, name, twist, problem):
    """The judge itself: a product that does not look at its operands."""
    case = any_tensor.Case("forward", (2, 33, 65, 4), torch.float32)
    rng = random.Random(0)
    case.operands = any_tensor._clean_operands(rng, case.operation, case.sizes, case.dtype)
    clean = dict(case.operands)
    case.operands[name], case.twists[name] = any_tensor.ANYTHING[twist](rng, clean[name]), twist
    product = qk.linear

    def careless(x, weight, bias, lora_A, lora_B, **rest):
        return product(clean["x"], weight, bias, clean["lora_A"], lora_B, **rest)

    monkeypatch.setattr(qk, "linear", careless)
    assert problem in any_tensor.run(case)


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("freed_name", ["x", "bias", "lora_A", "lora_B", "packed", "absmax", "nested_table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_freed_memory_is_refused_by_name(freed_name, dtype):
    weight = qk.quantize(torch.randn(32, 64), nested_table=qk.default_nested_table().clone())
    shapes = {"x": (2, 64), "bias": (32,), "lora_A": (4, 64), "lora_B": (32, 4)}
    operands = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    qk.linear(weight=weight, **operands)  # the weight has been checked, and is remembered
    freed(operands[freed_name] if freed_name in operands else getattr(weight, freed_name))
    with pytest.raises(RuntimeError, match=rf"{freed_name} needs \d+ bytes of memory, and its storage holds 0"):
        qk.linear(weight=weight, **operands)


def test_memory_that_comes_back_is_used_again():
    weight = qk.quantize(torch.randn(32, 64))
    x = torch.randn(2, 64)
    expected = qk.linear(x, weight)
    kept = weight.packed.clone()
    weight.packed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="packed needs 1024 bytes"):
        qk.linear(x, weight)
    weight.packed.untyped_storage().resize_(1024)
    weight.packed.copy_(kept)
    assert torch.equal(qk.linear(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_freed_operand_that_has_to_be_copied_is_refused(dtype):
    """Before torch copies it, which ends the process."""
    layer = qk.QLinear(64, 32, dtype=dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float16
    freed(layer.bias.data)
    with pytest.raises(RuntimeError, match="bias needs"):
        layer(torch.randn(2, 64).to(other))
    weight = qk.quantize(torch.randn(32, 64))
    with pytest.raises(RuntimeError, match="x needs"):
        qk.linear(freed(torch.randn(64, 2).t()), weight)
    with pytest.raises(RuntimeError, match="x needs"), torch.autocast("cpu", torch.bfloat16):
        qk.linear(freed(torch.randn(2, 64)), weight)
    with pytest.raises(RuntimeError, match="weight needs"):
        qk.quantize(freed(torch.randn(64, 32).t()))
    with pytest.raises(RuntimeError, match="out needs"):
        weight.dequantize(out=freed(torch.empty(32, 64)))


@pytest.mark.parametrize("saved", ["x", "lora_A", "lora_B"])
def test_what_was_freed_before_backward_is_refused(saved):
    weight = qk.quantize(torch.randn(32, 64))
    leaves = {"x": torch.randn(2, 64), "lora_A": torch.randn(4, 64), "lora_B": torch.randn(32, 4)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = qk.linear(weight=weight, **leaves)
    freed(leaves[saved].data)
    with pytest.raises(RuntimeError, match=f"{saved} needs"):
        y.sum().backward()


def test_negatives_and_zeros_without_memory():
    weight = qk.quantize(torch.randn(32, 64))
    x, bias = torch.randn(2, 64), torch.randn(32)
    expected = qk.linear(x, weight, bias)
    imaginary = torch.complex(torch.zeros(32), -bias).conj().imag
    assert torch.equal(qk.linear(torch._neg_view(-x), weight, imaginary), expected)
    zeros = torch._efficientzerotensor(x.shape)
    assert torch.equal(qk.linear(zeros, weight, bias), bias.expand(2, 32))
    negative = qk.NF4Weight(
        *weight.pieces[:2], torch._neg_view(-weight.nested_absmax), *weight.pieces[3:], weight.shape
    )
    assert torch.equal(qk.linear(x, negative, bias), expected)
    assert torch.equal(negative.dequantize(), weight.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_of_pieces_do_not_matter(dtype, double_quant):
    """Constants as a column, for one."""
    weight = qk.quantize(torch.randn(2, 192), double_quant)
    columns = (None if piece is None else piece[:, None] for piece in weight.pieces)
    assert torch.equal(qk.NF4Weight(*columns, weight.shape).dequantize(dtype), weight.dequantize(dtype))


def one_layer():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    qk.quantize_model(model, rank=4, progress=False)
    return model


@pytest.mark.parametrize(
    ("tensor", "call"),
    [
        ("lora_A.default", lambda model, folder: model[0].merge()),
        ("lora_B.default", lambda model, folder: qk.save_adapter(model, folder)),
        ("bias", lambda model, folder: model[0].to_linear()),
        ("bias", lambda model, folder: model[0].reset_parameters()),
        ("lora_A.default", lambda model, folder: model[0].reset_parameters()),
        ("weight_packed", lambda model, folder: model[0].weight.save(folder / "weight.safetensors")),
        ("weight_nested_absmax", lambda model, folder: model[0].weight.save(folder / "weight.safetensors")),
        ("bias", lambda model, folder: qk.QLinear.from_nf4(model[0].weight, model[0].bias)),
    ],
)
def test_freed_memory_is_not_read_by_what_a_layer_does(tensor, call, tmp_path):
    """Nor is what lies in fresh memory written in its place."""
    model = one_layer()
    freed(dict(model[0].named_parameters()).get(tensor, getattr(model[0], tensor, None)).data)
    with pytest.raises(RuntimeError, match=rf"{tensor.split('.')[0].removeprefix('weight_')}.* (needs|freed)"):
        call(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_freed_table_is_refused():
    with pytest.raises(RuntimeError, match="nested_table needs"):
        qk.quantize(torch.randn(32, 64), nested_table=freed(torch.linspace(-1, 1, 256)))
