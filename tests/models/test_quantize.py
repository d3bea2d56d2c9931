"""quantize_model: what is swapped, what it reports, and what it does when something fails."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from contract import relative_error
from small.blocks import IDS, LINEARS, Model, assert_unchanged, fingerprint, quantize, quantized, with_adapters
from torch import nn

import qlora_kernels
from qlora_kernels import QLinear, quantize_model
from qlora_kernels.models import quantize as quantizing


def test_every_linear_but_the_head_becomes_4_bit_and_only_adapters_train():
    model = Model().eval()
    dense = copy.deepcopy(model)
    report = quantize(model)
    assert report.quantized == report.adapted == quantized(model) == LINEARS
    assert report.left_alone == {"lm_head": "named in skip"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{side}.default" for name in LINEARS for side in "AB"
    }
    assert not any(module.training for module in model.modules())
    for name in LINEARS:
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(model.get_submodule(name).weight.dequantize())
    assert relative_error(model(IDS), dense(IDS).double()) < 1e-5

    weights = sum(dense.get_submodule(name).weight.numel() for name in LINEARS)
    assert report.total_parameters == sum(p.numel() for p in dense.parameters()) + report.trainable_parameters
    assert report.trainable_parameters == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 128))
    assert report.bytes_before == 4 * sum(p.numel() for p in dense.parameters())
    tables = 1024 * len(LINEARS)
    saved = report.bytes_before - report.bytes_after + 4 * report.trainable_parameters + tables
    assert 4 * weights - 4.2 / 8 * weights < saved < 4 * weights - 4 / 8 * weights


def test_the_report_reads_well():
    text = str(quantize(Model()))
    assert text.startswith(
        "8 linear layers quantized to NF4, 8 of them with an adapter\n0.2 MiB before, 0.1 MiB after\n"
    )
    assert "5,120 of " in text
    assert text.endswith("left alone:\n  lm_head: named in skip")


def test_rank_0_and_other_options():
    model = Model().half()
    report = quantize(model, rank=0, double_quant=False, compute_dtype=torch.bfloat16)
    assert report.trainable_parameters == 0
    assert with_adapters(model) == report.adapted == []
    layer = model.layers[0].q_proj
    assert layer.weight.bits_per_weight == 4.5
    assert layer.dtype == layer.bias.dtype == torch.bfloat16
    model = Model().bfloat16()
    quantize(model, rank=2, alpha=8, dropout=0.1, rslora=True, adapter_dtype=torch.float32)
    layer = model.layers[1].down
    assert layer.adapters["default"] == qlora_kernels.AdapterConfig(2, 8, 0.1, True)
    assert layer.lora_A["default"].dtype == torch.float32
    assert layer.dtype == torch.bfloat16


def test_quantizing_again_takes_only_what_is_new():
    model = Model()
    quantize(model, target_modules=["q_proj"], skip=("lm_head", "down"))
    report = quantize(model)
    assert report.quantized == [n for n in LINEARS if n.endswith("down")]
    assert report.left_alone["layers.0.q_proj"] == "4-bit already"
    assert model.layers[0].q_proj.lora_A["default"].requires_grad
    with pytest.raises(ValueError, match=r"no nn\.Linear to quantize; .*layers\.0\.down: 4-bit already"):
        quantize(model)


def test_a_meta_model_gets_shapes():
    with torch.device("meta"):
        model = Model()
    quantize(model)
    assert model.layers[0].up.weight.packed.is_meta
    real = Model()
    quantize(real)
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model(IDS), real(IDS))


def test_layers_are_swapped_one_at_a_time(monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
    dense = [weakref.ref(layer.weight) for layer in model]
    alive = []
    original = QLinear.from_linear.__func__

    def spy(cls, linear, *args, **kwargs):
        alive.append(sum(ref() is not None for ref in dense))
        return original(cls, linear, *args, **kwargs)

    monkeypatch.setattr(QLinear, "from_linear", classmethod(spy))
    gc.disable()  # reference counts alone must free them
    try:
        quantize(model)
        alive.append(sum(ref() is not None for ref in dense))
    finally:
        gc.enable()
    assert alive == [5, 4, 3, 2, 1, 0]


def test_a_lazy_module_is_refused():
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet \(a lazy module\); run a batch"):
        quantize(model)
    assert type(model[0]) is nn.Linear


def test_progress_is_shown_or_not(capsys):
    quantize(Model(), progress=True)
    assert "quantizing" in capsys.readouterr().err
    quantize(Model(), progress=False)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------- bad input


def _with(name, value):
    model = Model()
    with torch.no_grad():
        model.get_submodule(name).weight[1, 2] = value
    return model


@pytest.mark.parametrize(
    ("make", "options", "raised", "message"),
    [
        (Model, {"rank": -1}, ValueError, "rank should be 0 .*found -1"),
        (Model, {"rank": 65}, ValueError, r"layers\.0\.q_proj: rank 65 is larger than the layer: a weight \[64, 64\]"),
        (Model, {"rank": 1.5}, TypeError, "rank should be an int"),
        (Model, {"alpha": 0}, ValueError, "alpha should be positive"),
        (Model, {"alpha": math.nan}, ValueError, "alpha should be positive"),
        (Model, {"dropout": 1.0}, ValueError, "dropout should be in"),
        (
            Model,
            {"target_modules": ["q_proj", "k_proj"]},
            ValueError,
            "'k_proj' matches no layer to adapt; candidates: q_proj, v_proj, up, down",
        ),
        (Model, {"target_modules": "proj"}, ValueError, "'proj' matches no layer"),
        (Model, {"target_modules": []}, ValueError, "an empty list matches no layer"),
        (Model, {"target_modules": ["lm_head"]}, ValueError, "lm_head is left alone: named in skip"),
        (Model, {"target_modules": "("}, ValueError, r"target_modules: '\(' is not a regular expression"),
        (Model, {"skip": "["}, ValueError, r"skip: '\[' is not a regular expression"),
        (Model, {"compute_dtype": torch.int8}, TypeError, "dtype should be one of"),
        (Model, {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype should be one of"),
        (lambda: nn.Linear(8, 8), {}, ValueError, r"itself a linear layer.*QLinear\.from_linear"),
        (lambda: QLinear(8, 8, rank=0), {}, ValueError, "itself a linear layer"),
        (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, r"no nn\.Linear to quantize.*: none"),
        (
            lambda: _with("layers.1.down", math.nan),
            {},
            ValueError,
            r"layers\.1\.down\.weight holds nan at index \(1, 2\)",
        ),
        (lambda: _with("layers.1.down", -math.inf), {}, ValueError, "holds -inf at index"),
        (
            lambda: _with("layers.1.down", -65504).half(),
            {},
            ValueError,
            r"layers\.1\.down\.weight holds 65504, so near the largest torch\.float16, .* use double_quant=False",
        ),
        (Model, {"device": "nonsense"}, RuntimeError, "nonsense"),
    ],
)
def test_bad_input_changes_nothing(make, options, raised, message):
    model = make()
    before = fingerprint(model)
    with pytest.raises(raised, match=message):
        quantize(model, **options)
    assert_unchanged(model, before)


def test_a_device_without_kernels_changes_nothing(monkeypatch):
    def no_backend(tensor):
        raise RuntimeError("this build has no kernels for that device")

    model = Model()
    before = fingerprint(model)
    monkeypatch.setattr(quantizing.backends, "backend_for", no_backend)
    for options in ({}, {"device": "cpu"}):
        with pytest.raises(RuntimeError, match="no kernels"):
            quantize(model, **options)
        assert_unchanged(model, before)


def fail_at(monkeypatch, count, error):
    """Makes quantization fail at its ``count``-th layer."""
    original, calls = QLinear.from_linear.__func__, []

    def from_linear(cls, *args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            raise error
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(QLinear, "from_linear", classmethod(from_linear))


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 0}, {"target_modules": ["layers.0.q_proj", "v_proj"]}, {"device": "cpu"}, {"skip": "lm_.*"}],
)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), KeyboardInterrupt()])
def test_what_failed_in_the_middle_goes_on_in_a_second_call(monkeypatch, options, error):
    torch.manual_seed(0)
    model = Model()
    whole = copy.deepcopy(model)
    before = copy.deepcopy(model).state_dict()
    quantize(whole, **options)
    with monkeypatch.context() as patch:
        fail_at(patch, 4, error)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                quantize(model, **options)
        else:
            with pytest.raises(RuntimeError) as caught:
                quantize(model, **options)
            assert caught.value.__cause__ is error
            count, why = len(quantized(whole)), f"{type(error).__name__}: {str(error) or 'MemoryError'}"
            assert str(caught.value) == (
                f"quantize_model stopped at layers.0.down ({why}); 3 of {count} layers are 4-bit now, and the "
                "others unchanged: pass the model to quantize_model again, "
                "with the same arguments, to go on with them. 4-bit: layers.0.q_proj, layers.0.v_proj, layers.0.up"
            )
    assert quantized(model) == LINEARS[:3]
    for name, value in model.state_dict().items():
        if name in before:
            assert torch.equal(value, before[name]), name
    quantize(model, **options)
    assert quantized(model) == quantized(whole)
    assert with_adapters(model) == with_adapters(whole)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in whole.named_parameters()
    }
    assert torch.equal(model(IDS), whole(IDS))


def test_a_failure_late_in_a_large_model_names_ten_layers(monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(60)])
    fail_at(monkeypatch, 51, MemoryError())
    with pytest.raises(RuntimeError, match=r"50 of 60 layers are 4-bit now, .* 4-bit: 0, 1, .*, 9 and 40 more$"):
        quantize(model)


def test_a_failure_at_the_first_layer_is_raised_unchanged(monkeypatch):
    model = Model()
    before = fingerprint(model)
    fail_at(monkeypatch, 1, MemoryError("no room"))
    with pytest.raises(MemoryError, match="no room"):
        quantize(model)
    assert_unchanged(model, before)


def test_a_failure_after_the_last_layer_says_how_to_go_on(monkeypatch):
    model = Model()

    def to(self, device):
        raise MemoryError

    monkeypatch.setattr(Model, "to", to)
    with pytest.raises(RuntimeError, match=r"all 8 layers are 4-bit now, .* call model\.to\('cpu'\) to go on"):
        quantize(model, device="cpu")
    assert quantized(model) == LINEARS
    assert all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


# --------------------------------------------------------------------------------------------- ordinary models


def test_a_model_trains_with_checkpointing_and_autocast():
    torch.manual_seed(1)
    model = Model()
    quantize(model, rank=8, dropout=0.05, adapter_dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            x = model.embedding(IDS)
            for block in model.layers:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            loss = F.cross_entropy(model.lm_head(x).flatten(0, 1).float(), IDS.roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_torchs_own_transformer_runs_in_both_modes():
    """Its fast path for inference reads linear1.weight and linear2.weight directly, bypassing the modules."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True), num_layers=2)
    assert len(quantize(model).quantized) == 4
    x = torch.randn(5, 3, 64)
    y = model(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), y, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(model(x, src_key_padding_mask=torch.zeros(5, 3, dtype=torch.bool)), y, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("a name", {}, "model should be a torch.nn.Module, found str"),
        (nn.Sequential(nn.Linear(64, 64)), {"target_modules": 3}, "target_modules should be a regular expression"),
        (nn.Sequential(nn.Linear(64, 64)), {"skip": (1,)}, "skip should be a regular expression"),
    ],
)
def test_arguments_of_another_type_are_refused(model, arguments, words):
    with pytest.raises(TypeError, match=words):
        quantize_model(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"r": 8}, "quantize_model does not take PEFT's names: 'r' is called 'rank' here"),
        ({"r": 8, "lora_alpha": 16}, "'r' is called 'rank', 'lora_alpha' is called 'alpha' here"),
        ({"lora_dropout": 0.1, "use_rslora": True}, "'lora_dropout' is called 'dropout', 'use_rslora' .* 'rslora'"),
        ({"modules_to_save": ["lm_head"]}, r"PEFT's 'modules_to_save': .* call requires_grad_\(True\)"),
        ({"use_dora": True}, "DoRA is not supported"),
        ({"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
    ],
)
def test_pefts_argument_names_are_explained(arguments, words):
    model = Model()
    before = fingerprint(model)
    with pytest.raises(TypeError, match=words):
        quantize_model(model, **arguments)
    assert_unchanged(model, before)
