"""The fine-tuning run: training, comparing, and what it writes. Models here are far smaller than the tiny one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
from dataclasses import replace

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from small_runs import SMALL, base_in, cache_fixture, hf_folder_fixture, losses, metrics, run_fixture  # noqa: F401 - fixtures

from qlora_kernels import PagedAdamW, PagedLion, finetune
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError
from qlora_kernels.finetune import data, dense_lora, memory, tiny
from qlora_kernels.finetune.options import OPTIMIZERS, Options
from qlora_kernels.finetune.train import Trainer, learning_rate, make_optimizer
from qlora_kernels.optim.engines import host as host_engine


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.1, 10])
def test_learning_rate(schedule, warmup):
    rates = [learning_rate(step, 100, 1.0, warmup, schedule) for step in range(100)]
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert max(rates) == pytest.approx(1.0)
    assert all(rate > 0 for rate in rates)
    end = 1.0 if schedule == "constant" else 0.1
    assert rates[-1] == pytest.approx(end, abs=0.02)


def test_both_kinds_of_adapter_start_alike():
    from qlora_kernels import NF4Weight, quantize  # noqa: F401 - the extension must load
    from qlora_kernels.layers.qlinear import QLinear

    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(64, 96))
    quantized = QLinear.from_linear(dense[0], rank=8, alpha=16)
    dense_lora.share_initial_values({"0": quantized}, seed=5)
    dense[0].weight.data = quantized.weight.dequantize()
    dense_lora.add_lora(dense, ["0"], 8, 16, 0.0, False, seed=5)
    assert torch.equal(dense[0].lora_A, quantized.lora_A["default"])
    B = torch.randn(96, 8)
    with torch.no_grad():
        dense[0].lora_B.copy_(B)
        quantized.lora_B["default"].copy_(B)
    x = torch.randn(5, 64)
    torch.testing.assert_close(dense(x), quantized(x), rtol=1e-4, atol=1e-5)


def test_peak_memory_sees_what_a_phase_allocates():
    with memory.PeakMemory() as idle:
        pass
    if idle.peak is None:
        pytest.skip("no /proc here")
    with memory.PeakMemory() as busy:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    with memory.PeakMemory() as after:
        pass
    assert busy.peak - busy.start > 60 << 20
    assert after.peak < busy.peak


def test_a_run_writes_what_it_promises(run, tmp_path, capsys):
    assert run("--compare", plot=True) == 0
    out = tmp_path / "out"
    text = capsys.readouterr().out
    for title in ("16-bit base", "NF4 base", "NF4 + LoRA", "16-bit + LoRA", "full fine-tuning", "recovers"):
        assert title in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(out / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not (out / "checkpoint.pt").exists()
    found = metrics(out)
    assert found["size"]["bits_per_weight"] == pytest.approx(4.127, abs=0.02)
    assert found["size"]["base_bytes_nf4"] < found["size"]["base_bytes_16bit"]
    results = found["results"]
    assert all(len(value) == 6 for value in losses(out).values())
    # The first step sees the base alone, B being zero: both bases have the same loss but for quantization.
    assert results["qlora"]["losses"][0] == pytest.approx(results["lora16"]["losses"][0], rel=0.02)
    assert all(math.isfinite(value["loss"]) and value["seconds"] > 0 for value in results.values())
    assert results["qlora"]["loss"] < results["nf4"]["loss"]


@pytest.mark.slow
def test_nf4_recovers_what_16_bit_lora_gains(run, tmp_path):
    """QLoRA's claim, on held-out text, with enough training for a gain far above what the seed changes."""
    small = [
        *("--tiny-hidden", "128", "--tiny-layers", "2", "--tiny-seq-len", "64", "--pretrain-steps", "200"),
        *("--steps", "200", "--seq-len", "64", "--batch-size", "8", "--rank", "8"),
        *("--eval-tokens", "16384", "--sample-tokens", "0", "--quiet"),
    ]
    assert run("--compare", small=small, cached=False) == 0
    found = metrics(tmp_path / "out")
    loss = {key: result["loss"] for key, result in found["results"].items()}
    gain = loss["base16"] - loss["lora16"]
    assert gain > 0.2
    assert loss["base16"] - loss["qlora"] >= 0.95 * gain
    assert found["recovery"] == pytest.approx((loss["base16"] - loss["qlora"]) / gain)


def test_the_adapter_on_disk_has_the_loss_that_was_reported(run, tmp_path):
    from qlora_kernels.finetune.evaluate import held_out_loss
    from qlora_kernels.finetune.source import Source, quantize
    from qlora_kernels.models import adapter_files

    litter = tmp_path / "out" / "adapter" / ".adapter_model.safetensors.abcdefgh.part"  # of a killed write
    litter.parent.mkdir(parents=True)
    litter.write_text("")
    assert run() == 0
    assert not litter.exists()
    found = metrics(tmp_path / "out")
    options = Options(**found["options"]).resolve()
    source = Source(options)
    model = source.load()
    quantize(model, options)
    adapter_files.load_adapter(model, tmp_path / "out" / "adapter")
    held_out = data.load_data(None, source.encode, source.end, options.seq_len, 0.1, 0).held_out
    loss = held_out_loss(model, held_out, options.batch_size, options.eval_tokens, "cpu", "", True)
    assert loss == pytest.approx(found["results"]["qlora"]["loss"], rel=1e-6)


def test_pretraining_happens_once(run, tmp_path, monkeypatch):
    assert run("--pretrain-steps", "5", cached=False) == 0
    first = metrics(tmp_path / "out")
    monkeypatch.setattr(tiny, "pretrain", lambda *_: pytest.fail("pretrained again"))
    assert run("--pretrain-steps", "5", cached=False) == 0
    assert losses(tmp_path / "out")["qlora"] == first["results"]["qlora"]["losses"]


@pytest.mark.slow
def test_the_first_of_two_runs_that_share_a_cache_writes_the_base(run, tmp_path, monkeypatch):
    assert run("--pretrain-steps", "3", "--cache", str(tmp_path / "a")) == 0
    original = Trainer.run

    def trained(self, phase, note):
        result = original(self, phase, note)
        if phase.name == "pretrain":  # meanwhile the other run ends
            base = base_in(tmp_path / "a")
            other = shutil.copytree(base, tmp_path / "b" / base.name)
            tensors = load_file(other / "model.safetensors")
            tensors["lm_head.weight"] *= 1.5
            save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        return result

    monkeypatch.setattr(Trainer, "run", trained)
    assert run("--pretrain-steps", "3", "--cache", str(tmp_path / "b"), out="second") == 0
    assert len(os.listdir(tmp_path / "b")) == 1, "litter"
    # It went on from the other's base, which is still there, as is shown by another loss than its own would have.
    first, second = (metrics(tmp_path / out)["results"]["base16"]["loss"] for out in ("out", "second"))
    assert first != second
    assert run("--pretrain-steps", "3", "--cache", str(tmp_path / "b"), out="third") == 0
    assert metrics(tmp_path / "third")["results"]["base16"]["loss"] == second


@pytest.mark.slow
def test_two_runs_at_the_same_time_with_one_cache(tmp_path):
    command = ["finetune", *SMALL, "--cache", str(tmp_path / "cache"), "--out"]
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    runs = [forked.start(main, [*command, str(tmp_path / log.stem)], errors=log) for log in logs]
    for process in runs:
        process.join()
    errors = [log.read_text() for log in logs]
    assert [process.exitcode for process in runs] == [0, 0], errors
    assert errors == ["", ""]  # --quiet
    assert base_in(tmp_path / "cache")
    assert len(os.listdir(tmp_path / "cache")) == 1, "litter"
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_slow_machine_does_fewer_pretraining_steps(run, tmp_path):
    # A limit that no machine meets: the least number of steps remains.
    assert run("--pretrain-steps", "100", "--pretrain-seconds", "1e-6", "--steps", "1", cached=False) == 0
    assert json.loads((base_in(tmp_path / "out") / "pretraining.json").read_text())["steps"] == 24


def test_a_time_limit_and_what_is_compared(run, tmp_path):
    assert run("--train-seconds", "1e-6", "--steps", "50", "--compare") == 0
    assert {key: len(value) for key, value in losses(tmp_path / "out").items()} == dict.fromkeys(
        ("qlora", "lora16", "full"), 24
    )


def test_accumulation_and_checkpointing_do_not_change_the_losses(run, tmp_path):
    assert run("--batch-size", "4", "--compute", "float32", out="a") == 0
    assert run("--batch-size", "2", "--grad-accum", "2", "--compute", "float32", out="b") == 0
    assert run("--batch-size", "4", "--gradient-checkpointing", "--compute", "float32", out="c") == 0
    expected = losses(tmp_path / "a")["qlora"]
    assert losses(tmp_path / "b")["qlora"] == pytest.approx(expected, rel=1e-4)
    assert losses(tmp_path / "c")["qlora"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_that_was_asked_for(name, tmp_path):
    limits = {} if name == "adamw" else {"page_file": str(tmp_path), "page_budget": 1 << 20}
    options = Options(optim=name, weight_decay=0.25, max_grad_norm=0.5, **limits).resolve()
    made = make_optimizer([torch.nn.Parameter(torch.ones(300))], 0.125, options)
    expected = {"adamw": torch.optim.AdamW, "paged_lion": PagedLion}.get(name, PagedAdamW)
    assert type(made) is expected
    [group] = made.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.125, 0.25, (0.9, 0.99))
    if name != "adamw":
        assert dataclasses.asdict(made._options) == {
            **{"state_bits": 8 if name.endswith("8bit") else 32, "max_grad_norm": 0.5, **limits},
            **{"master_weights": False, "skip_nonfinite": False},
        }
        for unlimited in (0.0, math.inf):
            settings = replace(options, max_grad_norm=unlimited)
            assert make_optimizer([torch.nn.Parameter(torch.ones(3))], 1.0, settings)._options.max_grad_norm is None


def test_lion_takes_a_lower_learning_rate_unless_one_is_given():
    for model, factor in (("tiny", 3), ("some/folder", 10)):
        adamw, lion = (Options(model=model, optim=name).resolve() for name in ("paged_adamw", "paged_lion"))
        assert (lion.lr, lion.full_lr) == pytest.approx((adamw.lr / factor, adamw.full_lr / factor))
        given = Options(model=model, optim="paged_lion", lr=0.5, full_lr=0.25).resolve()
        assert (given.lr, given.full_lr) == (0.5, 0.25)


@pytest.mark.slow
def test_paged_adamw_trains_as_torch_does(run, tmp_path):
    """Pretraining, too, and with every gradient clipped."""
    more = ("--compare", "--max-grad-norm", "0.05", "--weight-decay", "0.1", "--compute", "float32")
    assert run(*more, cached=False) == 0
    assert run(*more, "--optim", "adamw", out="torch", cached=False) == 0
    assert run(*more, "--max-grad-norm", "0", out="free", cached=False) == 0
    ours, expected, free = (losses(tmp_path / out) for out in ("out", "torch", "free"))
    for key in ("qlora", "lora16", "full"):
        assert ours[key] == pytest.approx(expected[key], rel=1e-4)
        assert ours[key] != pytest.approx(free[key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_lion"])
def test_the_other_optimizers_learn(run, tmp_path, name):
    """Whatever text this Python's library makes: the adapters gain 0.02 to 0.03 in 160 steps."""
    small = [*SMALL, "--pretrain-steps", "40", "--steps", "160", "--compare"]
    assert run("--optim", name, small=small, cached=False) == 0
    pretraining = json.loads((base_in(tmp_path / "out") / "pretraining.json").read_text())["losses"]
    assert sum(pretraining[-4:]) < 0.95 * sum(pretraining[:4])
    results = metrics(tmp_path / "out")["results"]
    before = results["base16"]["loss"]
    for key, least in (("qlora", 0.01), ("lora16", 0.01), ("full", 0.3)):
        assert before - results[key]["loss"] > least, key
    assert metrics(tmp_path / "out")["options"]["optim"] == name


def test_states_in_a_file_give_the_same_numbers(run, tmp_path, monkeypatch):
    kinds = []
    original = host_engine.HostArena

    def arena(*arguments):
        made = original(*arguments)
        kinds.append(made.kind)
        return made

    monkeypatch.setattr(host_engine, "HostArena", arena)
    folder = tmp_path / "states"
    folder.mkdir()
    assert run() == 0
    assert run("--page-file", str(folder), "--page-budget", str(1 << 30), out="paged") == 0
    assert kinds[0] == "host memory"
    assert kinds[-1] == "a memory-mapped file"
    assert losses(tmp_path / "out") == losses(tmp_path / "paged")
    assert not os.listdir(folder), "the file has a name"


def test_no_room_for_the_states_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run("--page-file", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"in a file in {tmp_path}, which cannot be allocated" in error
    assert error.count("\n") == 1


def test_pairs_and_epochs(run, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) for i in range(20)))
    at = SMALL.index("--steps")
    small = SMALL[:at] + SMALL[at + 2 :]
    assert run("--data", str(path), "--epochs", "1", small=small) == 0
    assert len(losses(tmp_path / "out")["qlora"]) == 9  # 18 examples, 2 in a batch


def test_text_folder_and_a_hugging_face_model(run, tmp_path, hf_folder):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"the quick brown fox number {i} jumps over the lazy dog again\n" * 40)
    more = ("--model", hf_folder, "--data", str(folder), "--target-modules", "q_proj,v_proj")
    assert run(*more) == 0
    found = metrics(tmp_path / "out")
    assert found["size"]["adapted_layers"] == 2
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == hf_folder


def test_a_loss_that_is_not_finite_ends_the_run(run, capsys):
    assert run("--lr", "1e30", "--max-grad-norm", "0") == 2
    assert "the loss became" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        ("adapter", False),
        ("adapter/adapter_model.safetensors", True),
        ("metrics.json", True),
        ("loss.png", True),
        ("checkpoint.pt", True),
    ],
)
def test_what_cannot_be_written_is_found_before_the_training(run, tmp_path, monkeypatch, capsys, name, is_folder):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if is_folder else path.write_text("mine")
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("training has begun"))
    assert run() == 2
    error = capsys.readouterr().err
    assert f"{path} cannot be written" in error
    assert error.count("\n") == 1


def test_options_refuse_nonsense():
    for field, value in (
        ("rank", 0),
        ("steps", 0),
        ("lr", -1.0),
        ("optim", "sgd"),
        ("held_out", 1.0),
        ("tiny_hidden", 65),
    ):
        with pytest.raises(InputError, match=f"--{field.replace('_', '-')}"):
            finetune.Options(**{field: value}).resolve()
