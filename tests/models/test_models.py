"""quantize_model: what is swapped, what is left alone and why, and adapters of a whole model."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from contract import relative_error
from torch import nn
from torch.nn.utils import parametrizations, prune

import qlora_kernels
from qlora_kernels import QLinear, quantize_model
from qlora_kernels.models import quantize as quantizing
from qlora_kernels.models import targets


class Block(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.norm = nn.Linear(width, 2 * width, bias=False), nn.LayerNorm(width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.norm(x + self.down(F.silu(self.up(self.v_proj(x) * self.q_proj(x).sigmoid()))))


class Model(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


LINEARS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj", "up", "down")]
IDS = torch.arange(12).view(2, 6)


def quantize(model, **options):
    return quantize_model(model, **{"rank": 4, "progress": False, **options})


def quantized(model):
    return [name for name, _ in targets.qlora_layers(model)]


def with_adapters(model):
    return [name for name, layer in targets.qlora_layers(model) if layer.adapters]


def randomize(model):
    for _, layer in targets.qlora_layers(model):
        for B in layer.lora_B.values():
            nn.init.normal_(B, std=0.05)


def fingerprint(model):
    return [(name, type(module)) for name, module in model.named_modules()], {
        key: (value.clone(), value.requires_grad) for key, value in dict(model.named_parameters()).items()
    }


def assert_unchanged(model, before):
    modules, parameters = fingerprint(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for key, (value, requires_grad) in parameters.items():
        assert torch.equal(value.nan_to_num(), before[1][key][0].nan_to_num())
        assert requires_grad == before[1][key][1]


# --------------------------------------------------------------------------------------------- what is swapped


def test_every_linear_but_the_head_becomes_4_bit_and_only_adapters_train():
    model = Model().eval()
    dense = copy.deepcopy(model)
    report = quantize(model)
    assert report.quantized == report.adapted == quantized(model) == LINEARS
    assert report.left_alone == {"lm_head": "named in skip"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{part}.default" for name in LINEARS for part in "AB"
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


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], [n for n in LINEARS if n.endswith("_proj")]),
        (["layers.1.up"], ["layers.1.up"]),
        (("1.up", "0.down"), ["layers.0.down", "layers.1.up"]),
        (r"layers\.0\..*", LINEARS[:4]),
        (r".*\.(up|down)", [n for n in LINEARS if n.endswith(("up", "down"))]),
        ("all-linear", LINEARS),
    ],
)
def test_targets_get_adapters_and_the_rest_is_quantized_all_the_same(targets, expected):
    model = Model()
    report = quantize(model, target_modules=targets)
    assert quantized(model) == report.quantized == LINEARS
    assert with_adapters(model) == report.adapted == expected


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


@pytest.mark.parametrize("skip", [["lm_head", "layers.0.up", "1.down"], r"lm_head|.*0\.up|.*1\.down"])
def test_skip_takes_names_and_expressions(skip):
    model = Model()
    report = quantize(model, skip=skip)
    assert sorted(report.left_alone) == ["layers.0.up", "layers.1.down", "lm_head"]
    assert report.quantized == [n for n in LINEARS if n not in report.left_alone]
    report = quantize(Model(), skip=())
    assert report.quantized == [*LINEARS, "lm_head"]


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


# --------------------------------------------------------------------------------------------- what is left alone


def test_tied_weights_are_left_alone():
    model = Model(tied=True)
    report = quantize(model, skip=())
    assert report.left_alone == {"lm_head": "its weight is tied to embedding.weight"}
    assert model.lm_head.weight is model.embedding.weight

    pair = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    pair["b"].weight = nn.Parameter(pair["a"].weight.detach())  # another Parameter, the same memory
    assert quantize(pair).left_alone == {
        "a": "its weight is tied to b.weight",
        "b": "its weight is tied to a.weight",
    }


def test_tied_biases_are_left_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    assert quantize(model).left_alone == {"0": "its bias is tied to 1.bias", "1": "its bias is tied to 0.bias"}
    assert model[1].bias is model[0].bias


def test_views_into_another_parameter_are_left_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model.fused = nn.Parameter(torch.randn(128, 64))
    model[0].weight = nn.Parameter(model.fused.detach()[:64])
    model[1].weight = nn.Parameter(model.fused.detach()[64:])
    assert quantize(model).left_alone == {"0": "its weight is tied to fused", "1": "its weight is tied to fused"}

    del model.fused  # parts of one allocation that do not overlap are not tied
    assert quantize(model).quantized == ["0", "1"]


def test_a_module_in_two_places_is_swapped_in_both():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Linear(64, 64)), "b": shared})
    assert quantize(model).quantized == ["a.0", "a.1"]
    assert isinstance(model["b"], QLinear)
    assert model["b"] is model["a"][0]


class Patched(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_is_no_plain_linear_is_left_alone_with_a_reason():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 64),
            "patched": Patched(64, 64),
            "normed": parametrizations.weight_norm(nn.Linear(64, 64)),
            "wide": nn.Linear(64, 64, dtype=torch.float64),
            "empty": nn.Linear(0, 64),
            "gpt2": Conv1D(64, 64),
            "attention": nn.MultiheadAttention(64, 4),
            "hooked": nn.Linear(64, 64),
            "pruned": nn.Linear(64, 64),
            "embedding": nn.Embedding(4, 64),
        }
    )
    model["hooked"].forward = lambda x: x
    prune.identity(model["pruned"], "weight")
    report = quantize(model)
    assert report.quantized == ["plain"]
    assert {name: reason.split(",")[0].split(";")[0] for name, reason in report.left_alone.items()} == {
        "patched": f"unsupported type {__name__}.Patched",
        "normed": "unsupported type torch.nn.utils.parametrize.ParametrizedLinear",
        "wide": "a weight in torch.float64",
        "empty": "an empty weight",
        "gpt2": "unsupported type transformers.pytorch_utils.Conv1D",
        "attention.out_proj": "unsupported type torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        "hooked": "its forward has been replaced",
        "pruned": "its weight is computed by a hook (weight_norm",
    }
    x = torch.randn(3, 1, 64)
    assert model["attention"](x, x, x)[0].shape == x.shape


def test_peft_layers_are_left_alone():
    peft = pytest.importorskip("peft")
    model = Model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    report = quantize(model)
    assert report.left_alone["layers.0.q_proj"].startswith("a PEFT layer")
    assert "layers.0.q_proj.base_layer" not in report.quantized
    assert "layers.0.v_proj" in report.quantized
    model(IDS)


def test_hooks_stay_where_they_were():
    model = Model()
    calls = []
    handle = model.layers[0].up.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    quantize(model)
    model(IDS)
    assert calls == [QLinear]
    handle.remove()
    model(IDS)
    assert len(calls) == 1


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
    def of(tensor):
        raise RuntimeError("this build has no kernels for that device")

    model = Model()
    before = fingerprint(model)
    monkeypatch.setattr(quantizing.backends, "backend_for", of)
    for options in ({}, {"device": "cpu"}):
        with pytest.raises(RuntimeError, match="no kernels"):
            quantize(model, **options)
        assert_unchanged(model, before)


def fail_at(monkeypatch, count, error):
    """Lets quantization fail at its ``count``-th layer."""
    original, calls = QLinear.from_linear.__func__, []

    def from_linear(cls, *args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            raise error
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(QLinear, "from_linear", classmethod(from_linear))


@pytest.mark.parametrize(
    "options", [{}, {"rank": 0}, {"target_modules": ["layers.0.q_proj", "v_proj"]}, {"device": "cpu"}, {"skip": "x.*"}]
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


def test_a_failure_at_the_first_layer_is_told_as_it_is(monkeypatch):
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


# --------------------------------------------------------------------------------------------- a model's adapters


@pytest.fixture
def model():
    made = Model()
    quantize(made, target_modules=["q_proj", "v_proj"])
    made.layers[0].q_proj.add_adapter("style", rank=2)
    made.layers[0].up.add_adapter("style", rank=2)
    made.layers[0].up.set_adapter(None)
    randomize(made)
    return made.eval()


def test_selecting_an_adapter_leaves_no_mixture(model):
    default = model(IDS)
    qlora_kernels.set_adapter(model, "style")
    active = {name: layer.active_adapter for name, layer in targets.qlora_layers(model)}
    assert {name for name, adapter in active.items() if adapter} == {"layers.0.q_proj", "layers.0.up"}
    assert not torch.equal(model(IDS), default)
    qlora_kernels.set_adapter(model, "default")
    assert torch.equal(model(IDS), default)
    with pytest.raises(KeyError, match="no adapter 'nobody' in this model; it has: 'default', 'style'"):
        qlora_kernels.set_adapter(model, "nobody")
    assert torch.equal(model(IDS), default)


def test_disabling_all(model):
    y = model(IDS)
    with pytest.raises(ZeroDivisionError), qlora_kernels.disable_adapters(model):
        base = model(IDS)
        raise ZeroDivisionError
    assert not torch.equal(base, y)
    assert torch.equal(model(IDS), y)
    for _, layer in targets.qlora_layers(model):
        layer.set_adapter(None)
    assert torch.equal(model(IDS), base)


def test_merging_all_and_taking_out(model):
    y = model(IDS)
    reports = qlora_kernels.merge_adapters(model)
    assert sorted(reports) == [n for n in LINEARS if n.endswith("_proj")]
    assert all(0 < report.weight_error < 0.2 for report in reports.values())
    assert 1e-3 < relative_error(model(IDS), y.double()) < 0.3
    with pytest.raises(RuntimeError, match="adapter 'default' is merged"):
        qlora_kernels.set_adapter(model, "style")
    with pytest.raises(RuntimeError, match="is merged"), qlora_kernels.disable_adapters(model):
        pass
    qlora_kernels.unmerge_adapters(model)
    assert torch.equal(model(IDS), y)
    with pytest.raises(RuntimeError, match="no layer of this model has a merged adapter"):
        qlora_kernels.unmerge_adapters(model)


def test_a_merge_that_fails_in_one_layer_is_taken_back_in_all(model):
    with torch.no_grad():
        model.layers[1].v_proj.lora_A["default"][0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        qlora_kernels.merge_adapters(model)
    assert all(layer.merged_adapter_name is None for _, layer in targets.qlora_layers(model))
    plain = Model()
    quantize(plain, rank=0)
    with pytest.raises(RuntimeError, match="no layer of this model has an active adapter"):
        qlora_kernels.merge_adapters(plain)


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
    """Its fast path for inference reads linear1.weight and linear2.weight past the modules."""
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
