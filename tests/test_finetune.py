"""The fine-tuning run: data, training, resuming, and what it writes. Models here are far smaller than the tiny one."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from qlora_kernels import finetune
from qlora_kernels.cli import main
from qlora_kernels.errors import InputError
from qlora_kernels.finetune import data, lora16, memory, tiny
from qlora_kernels.finetune import run as run_module
from qlora_kernels.finetune.options import Options
from qlora_kernels.finetune.train import Trainer, learning_rate
from qlora_kernels.quantize_folder import quantize_folder

SMALL = [
    *("--tiny-hidden", "64", "--tiny-layers", "1", "--tiny-seq-len", "32", "--pretrain-steps", "6"),
    *("--steps", "6", "--seq-len", "32", "--batch-size", "2", "--rank", "4"),
    *("--eval-tokens", "512", "--sample-tokens", "8", "--save-every", "2", "--quiet"),
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder that keeps the pretrained base between tests."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(tmp_path, cache):
    """Runs the command in this process; returns its exit code."""

    def call(*more, out="out", small=SMALL, cached=True):
        where = ["--cache", cache] if cached else []
        return main(["finetune", *small, *where, "--out", str(tmp_path / out), *more])

    return call


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def losses(folder) -> dict[str, list[float]]:
    return {key: value["losses"] for key, value in metrics(folder)["results"].items() if "losses" in value}


# ---------------------------------------------------------------------------------------------------------- data


def test_split_keeps_held_out_paragraphs_out_of_the_training_text():
    repeated = "This paragraph is long enough to count and it stands in many places."
    text = "\n\n".join(f"paragraph {i} has its own words, {i * i}, {i**3}\n\n{repeated}" for i in range(200))
    training, held_out, dropped = data.split_text(text, 0.1)
    assert len(held_out) == 4
    assert 0.08 * len(text) < sum(map(len, held_out)) < 0.12 * len(text)
    assert not any(repeated in chunk for chunk in training)
    assert dropped > 100 * len(repeated)
    own = [p for chunk in held_out for p in chunk.split("\n\n") if p.startswith("paragraph")]
    assert own
    assert not any(p in chunk for p in own[1:-1] for chunk in training)


def test_windows_follow_from_seed_and_number_and_cover_an_epoch():
    tokens = torch.arange(1000, dtype=torch.int32)
    windows = data.Windows(tokens, 16, seed=3)
    count = len(windows)
    batches = [windows.batch(i, 1) for i in range(2 * count)]
    again = data.Windows(tokens, 16, seed=3).batch(count + 5, 1)
    assert torch.equal(again.inputs, batches[count + 5].inputs)
    for epoch in (batches[:count], batches[count:]):
        starts = sorted(int(batch.inputs[0, 0]) for batch in epoch)
        assert all(b - a == 16 for a, b in itertools.pairwise(starts))
    assert all(torch.equal(b.inputs[:, 1:], b.labels[:, :-1]) for b in batches)
    assert not torch.equal(data.Windows(tokens, 16, seed=4).batch(0, 4).inputs, windows.batch(0, 4).inputs)


@pytest.mark.parametrize("length", [17, 18, 32, 33, 47, 49])  # one window exactly, spare tokens, just under two
def test_windows_of_short_streams(length):
    windows = data.Windows(torch.arange(length), 16, seed=0)
    for index in range(5):
        assert windows.batch(index, 2).inputs.shape == (2, 16)
    counted = sum(batch.counted for batch in windows.sequential(2, 10**6))
    assert counted == length - 1


def test_pairs_count_completions_only():
    pairs = data.Pairs([([1, 2, 3, 4, 5], 3), ([6, 7], 1)], 16, pad=0, seed=0)
    batch = next(pairs.sequential(2, 100))
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 4, 5], [7, -100, -100, -100]]
    assert batch.counted == 3


def test_jsonl_splits_without_repeating_examples(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i % 20} + 1 =", "completion": f" {i % 20 + 1}"} for i in range(100)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    loaded = data.load_data(str(path), tiny.encode, tiny.END, 32, 0.1, 0)
    held_out = {tuple(ids) for ids, _ in loaded.held_out.examples}
    assert loaded.train.examples
    assert not held_out & {tuple(ids) for ids, _ in loaded.train.examples}
    assert all(ids[-1] == tiny.END for ids, _ in loaded.train.examples)


def test_a_pair_that_is_too_long_keeps_some_of_both(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "p" * 50 + str(i), "completion": "c" * 50}) for i in range(4)))
    loaded = data.load_data(str(path), tiny.encode, tiny.END, 32, 0.25, 0)
    for ids, prompt in loaded.train.examples:
        assert len(ids) == 33
        assert 8 <= prompt <= 24


def test_a_byte_order_mark_and_half_a_character(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\ud800", "completion": "b"}')
    assert data.read_pairs(str(path)) == [("a?", "b")]


def test_byte_tokenizer_agrees_with_plain_bytes():
    text = "def f(x):\n\treturn 'é☃ \U0001f600'  # \x00\r\n"
    tokenizer = tiny.tokenizer()
    assert tokenizer(text)["input_ids"] == tiny.encode(text)
    assert tokenizer.decode(tiny.encode(text)) == text
    assert tokenizer.eos_token_id == tiny.END


# ------------------------------------------------------------------------------------------------------ training


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
    from qlora_kernels.qlinear import QLinear

    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(64, 96))
    quantized = QLinear.from_linear(dense[0], rank=8, alpha=16)
    lora16.share_initial_values({"0": quantized}, seed=5)
    dense[0].weight.data = quantized.weight.dequantize()
    lora16.add_lora(dense, ["0"], 8, 16, 0.0, False, seed=5)
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
    assert run("--compare") == 0
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


def test_the_adapter_on_disk_has_the_loss_that_was_reported(run, tmp_path):
    from qlora_kernels import adapters
    from qlora_kernels.finetune.base import Source, quantize
    from qlora_kernels.finetune.evaluate import held_out_loss

    litter = tmp_path / "out" / "adapter" / ".adapter_model.safetensors.abcdefgh.part"  # of a killed write
    litter.parent.mkdir(parents=True)
    litter.write_text("")
    assert run() == 0
    assert not litter.exists()
    found = metrics(tmp_path / "out")
    options = Options(**found["options"])
    source = Source(options)
    model = source.load()
    quantize(model, options)
    adapters.load_adapter(model, tmp_path / "out" / "adapter")
    held_out = data.load_data(None, source.encode, source.end, options.seq_len, 0.1, 0).held_out
    loss = held_out_loss(model, held_out, options.batch_size, options.eval_tokens, "cpu", "", True)
    assert loss == pytest.approx(found["results"]["qlora"]["loss"], rel=1e-6)


def test_pretraining_happens_once(run, tmp_path, monkeypatch):
    assert run("--pretrain-steps", "5", cached=False) == 0
    first = metrics(tmp_path / "out")
    monkeypatch.setattr(tiny, "pretrain", lambda *_: pytest.fail("pretrained again"))
    assert run("--pretrain-steps", "5", cached=False) == 0
    assert losses(tmp_path / "out")["qlora"] == first["results"]["qlora"]["losses"]


def base_in(folder):
    [base] = [found for found in folder.iterdir() if found.name.startswith("tiny-base")]
    return base


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


def test_two_runs_at_the_same_time_with_one_cache(tmp_path):
    command = [sys.executable, "-m", "qlora_kernels", "finetune", *SMALL, "--cache", str(tmp_path / "cache"), "--out"]
    runs = [subprocess.Popen([*command, str(tmp_path / out)], stderr=subprocess.PIPE, text=True) for out in "ab"]
    errors = [process.communicate()[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], errors
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


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory) -> str:
    """A Llama with one layer and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("hf") / "model")
    words = [*("<unk>", "</s>", "the", "quick", "brown", "fox", "number"), *("jumps", "over", "lazy", "dog", "again")]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------- resuming


def interrupt(monkeypatch, phase: str, step: int, signum: int = signal.SIGINT) -> None:
    """Sends a signal to this process in the middle of a training step."""
    original = Trainer._step

    def stepped(self, current, optimizer, parameters, number, total):
        if current.name == phase and number == step:
            os.kill(os.getpid(), signum)
        return original(self, current, optimizer, parameters, number, total)

    monkeypatch.setattr(Trainer, "_step", stepped)


# Dropout draws from torch's generator, so its state must come back too.
THOROUGH = ("--compare", "--lora-dropout", "0.1", "--grad-accum", "2")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache):
    """The output of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["finetune", *SMALL, *THOROUGH, "--cache", cache, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("phase", ["qlora", "lora16", "full"])
def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(run, whole, tmp_path, monkeypatch, capsys, phase):
    with monkeypatch.context() as patch:
        interrupt(patch, phase, 2)
        assert run(*THOROUGH) == 130
    message = capsys.readouterr().err
    assert "SIGINT: stopped after step 3 of 6" in message
    assert message.rstrip().endswith("--resume")
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert run(*THOROUGH, "--resume") == 0
    assert losses(tmp_path / "out") == losses(whole)
    for key, value in metrics(whole)["results"].items():
        assert metrics(tmp_path / "out")["results"][key]["loss"] == value["loss"]
    first, second = (load_file(o / "adapter" / "adapter_model.safetensors") for o in (tmp_path / "out", whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("save_every", ["2", "0"])
def test_a_signal_after_the_last_step_loses_no_training(run, whole, tmp_path, monkeypatch, save_every):
    original = run_module.held_out_loss

    def evaluated(model, held_out, batch_size, limit, device, title, quiet):
        if "LoRA" in title:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, held_out, batch_size, limit, device, title, quiet)

    options = (*THOROUGH[1:], "--save-every", save_every)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "held_out_loss", evaluated)
        assert run(*options) == 143
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *_: pytest.fail("trained again"))
        assert run(*options, "--resume") == 0
    assert losses(tmp_path / "out")["qlora"] == losses(whole)["qlora"]
    assert metrics(tmp_path / "out")["results"]["qlora"]["loss"] == metrics(whole)["results"]["qlora"]["loss"]


def test_a_signal_between_steps_saves_them(run, tmp_path, monkeypatch, capsys):
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n=1):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_bar", lambda *_: Bar(disable=True))
        assert run("--save-every", "0") == 130
    assert "SIGINT: stopped after step 1 of 6" in capsys.readouterr().err
    assert run("--resume", "--save-every", "0") == 0
    assert len(losses(tmp_path / "out")["qlora"]) == 6


def test_sigterm_in_pretraining_saves_too(run, tmp_path, monkeypatch, cache):
    with monkeypatch.context() as patch:
        interrupt(patch, "pretrain", 3, signal.SIGTERM)
        assert run(cached=False) == 143
    assert run("--resume", cached=False) == 0
    assert run(out="whole", cached=False) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_resume_on_a_4_bit_folder(run, tmp_path, monkeypatch, hf_folder):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    quantize_folder(hf_folder, tmp_path / "4bit", progress=False)
    options = ("--model", str(tmp_path / "4bit"), "--data", str(text))
    assert run(*options, out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run(*options) == 130
    assert run(*options, "--resume") == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_resume_refuses_another_run(run, tmp_path, monkeypatch, capsys, hf_folder):
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run() == 130
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("some other text that is long enough to train on\n" * 50)
    for more, expected in (
        (("--lr", "0.5"), "--lr was 0.004 and is 0.5"),
        (("--rank", "2"), "--rank was 4 and is 2"),
        (("--eval-tokens", "256"), "--eval-tokens was 512 and is 256"),
        (("--data", str(other)), "--data was None"),
        (("--model", hf_folder), "--model was tiny"),
    ):
        capsys.readouterr()
        assert run("--resume", *more) == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    assert run("--resume") == 0


def test_resume_notices_that_the_base_has_changed(run, tmp_path, monkeypatch, capsys, hf_folder):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", hf_folder, str(model)], check=True)
    options = ("--model", str(model), "--data", str(text))
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run(*options) == 130
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run(*options, "--resume") == 2
    assert "the base model differs" in capsys.readouterr().err


def test_resume_without_or_with_a_damaged_checkpoint(run, tmp_path, monkeypatch, capsys):
    assert run("--resume") == 2
    assert "no run was interrupted" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run() == 130
    path = tmp_path / "out" / "checkpoint.pt"
    whole = path.read_bytes()
    value = torch.load(path, weights_only=True)
    next(iter(value["tensors"].values())).view(torch.int32)[0, 0] ^= 1
    torch.save(value, path)
    flipped = path.read_bytes()
    torch.save({**value, "step": 1}, path)
    for damaged in (whole[:-1000], b"", b"\x80\x02.", b"PK\x03\x04", flipped, path.read_bytes()):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert run("--resume") == 2
        error = capsys.readouterr().err
        assert "not a whole checkpoint" in error or "is damaged" in error
        assert error.count("\n") == 1
    path.write_bytes(whole)
    assert run("--resume") == 0


def test_kill_9_leaves_the_last_checkpoint_whole(run, tmp_path, cache):
    options = [*SMALL, "--cache", cache, "--steps", "60", "--save-every", "1"]
    assert run("--steps", "60", "--save-every", "1", out="whole") == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qlora_kernels", "finetune", *options, "--out", str(out)]
    chance, kills = random.Random(0), 0
    for attempt in range(3):
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        before = (out / "checkpoint.pt").stat().st_mtime_ns if resume else 0
        process = subprocess.Popen([*command, *resume], stderr=subprocess.PIPE)
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline:
            if (out / "checkpoint.pt").exists() and (out / "checkpoint.pt").stat().st_mtime_ns != before:
                time.sleep(chance.uniform(0, 0.2))  # somewhere in a step, or in the next write
                break
            time.sleep(0.005)
        process.kill()
        error = process.communicate()[1].decode()
        assert process.returncode in (-signal.SIGKILL, 0), f"attempt {attempt}: {error}"
        kills += process.returncode != 0
    assert kills
    if (out / "checkpoint.pt").exists():
        assert run("--resume", "--steps", "60", "--save-every", "1") == 0
    assert losses(out) == losses(tmp_path / "whole")
    assert not list(out.glob(".checkpoint.pt*")), "litter of a killed write"


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
    for field, value in (("rank", 0), ("steps", 0), ("lr", -1.0), ("held_out", 1.0), ("tiny_hidden", 65)):
        with pytest.raises(InputError, match=f"--{field.replace('_', '-')}"):
            finetune.Options(**{field: value}).resolve()
