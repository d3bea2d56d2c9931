"""Runs on messages and data sets, from files of options, on models that are quantized already."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

pytest.importorskip("transformers")

from small.runs import (  # noqa: F401 - fixtures
    SMALL,
    cache_fixture,
    hf_folder_fixture,
    losses,
    metrics,
    mixture_folder_fixture,
    run_fixture,
)

from qlora_kernels.finetune.train import Trainer

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def conversations(path, count: int = 12):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "again"]
    turns = [
        [
            {"role": "user", "content": f"number {words[i % 9]} {words[i // 9]}"},
            {"role": "assistant", "content": f"{words[i % 9]} jumps over"},
        ]
        for i in range(count)
    ]
    path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    return str(path)


def interrupt(patch) -> None:
    """Ctrl-C at the third step of a run."""
    original = Trainer._step

    def stepped(self, phase, optimizer, parameters, step, total):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, phase, optimizer, parameters, step, total)

    patch.setattr(Trainer, "_step", stepped)


def test_messages_on_the_tiny_model_and_evaluation_on_a_file(run, tmp_path):
    path, other = conversations(tmp_path / "a.jsonl"), conversations(tmp_path / "b.jsonl", 3)
    assert run("--data", path, "--eval-data", other) == 0
    report = metrics(tmp_path / "out")
    assert report["data"]["kind"] == "messages"
    assert report["data"]["chat_template"]["source"] == "the chat template of the tiny model"
    assert (report["data"]["train_examples"], report["data"]["held_out_examples"]) == (12, 3)
    assert report["data"]["held_out_in_training"] == 3
    assert report["options"]["eval_data"] == other
    assert report["options"]["held_out"] is None
    assert losses(tmp_path / "out")["qlora"][-1] < losses(tmp_path / "out")["qlora"][0]


def test_evaluation_on_what_was_trained_on_is_pointed_out(run, tmp_path, capsys):
    path, other = conversations(tmp_path / "a.jsonl"), conversations(tmp_path / "b.jsonl", 3)
    loud = [word for word in SMALL if word != "--quiet"]
    assert run("--data", path, "--eval-data", other, small=loud) == 0
    assert "3 of 3 examples to evaluate on are in the training data too" in capsys.readouterr().out


def test_a_template_of_one_s_own_is_part_of_the_run(run, tmp_path, hf_folder, monkeypatch, capsys):
    path = conversations(tmp_path / "a.jsonl")
    assert run("--model", hf_folder, "--data", path) == 2
    assert "no chat template; give one with --chat-template FILE" in capsys.readouterr().err
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    given = ("--model", hf_folder, "--data", path, "--chat-template", str(template))
    with monkeypatch.context() as patch:
        interrupt(patch)
        assert run(*given) == 130
    capsys.readouterr()
    template.write_text(TEMPLATE + "{# #}")  # the tokens are the same
    assert run(*given, "--resume") == 2
    assert "this is not the run that was interrupted: the chat template differs" in capsys.readouterr().err
    template.write_text(TEMPLATE)
    assert run(*given, "--resume") == 0
    assert metrics(tmp_path / "out")["data"]["chat_template"]["source"] == f"--chat-template {template}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "nowhere.jinja cannot be read"),
        (b"", "is empty"),
        (b"\xff", "cannot be used"),
        (b" " * (1 << 20) + b"x", "has more than 1 MiB"),
        (b"{% for %}", "cannot be applied"),
    ],
)
def test_templates_that_cannot_be_used(run, tmp_path, capsys, content, words):
    template = tmp_path / "nowhere.jinja"
    if content is not None:
        template.write_bytes(content)
    assert run("--data", conversations(tmp_path / "a.jsonl"), "--chat-template", str(template)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(template) in error
    assert not (tmp_path / "out").exists()


def test_a_template_without_messages_is_refused(run, tmp_path, capsys):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert run("--chat-template", str(tmp_path / "chat.jinja")) == 2
    assert "--chat-template is for messages, and the data has none" in capsys.readouterr().err


EXPERTS = ("--target-modules", "q_proj", "--target-parameters", "gate_up_proj,down_proj")


def test_the_experts_of_a_mixture(run, tmp_path, mixture_folder, monkeypatch):
    """An adapter for each, from a dense folder and from a 4-bit one, from the same values; and both can be resumed."""
    from qlora_kernels.interop.transformers.quantize_folder import quantize_folder

    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog again number " * 60)
    packed = str(tmp_path / "packed")
    quantize_folder(mixture_folder, packed, progress=False)
    given = ("--data", str(tmp_path / "a.txt"), *EXPERTS)
    for folder, out in ((mixture_folder, "dense"), (packed, "four")):
        assert run("--model", folder, *given, out=out) == 0
        report = metrics(tmp_path / out)
        assert (report["size"]["quantized_layers"], report["size"]["adapted_layers"]) == (6, 3)
        assert report["size"]["quantized_weights"] == 4 * 64 * 64 + 4 * 3 * 64 * 128
        config = json.loads((tmp_path / out / "adapter" / "adapter_config.json").read_text())
        assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
    expected = losses(tmp_path / "dense")["qlora"]
    assert losses(tmp_path / "four")["qlora"] == expected
    assert expected[-1] < expected[0]
    with monkeypatch.context() as patch:
        interrupt(patch)
        assert run("--model", mixture_folder, *given) == 130
    assert run("--model", mixture_folder, *given, "--resume") == 0
    assert losses(tmp_path / "out")["qlora"] == expected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--target-parameters", "w1"), "'w1' matches no weights of experts; candidates: gate_up_proj, down_proj"),
        ((*EXPERTS, "--lora-dropout", "0.1"), "have no dropout, found 0.1"),
        ((*EXPERTS, "--compare"), "--compare has no adapters of experts on the 16-bit base"),
    ],
)
def test_experts_that_cannot_be_adapted(run, tmp_path, mixture_folder, capsys, more, words):
    assert run("--model", mixture_folder, *more) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_4_bit_folder_keeps_dense_stays_dense(run, tmp_path, mixture_folder):
    import shutil

    import transformers

    from qlora_kernels import quantize_model

    model = transformers.AutoModelForCausalLM.from_pretrained(mixture_folder)
    quantize_model(model, rank=0, skip=["self_attn", "lm_head"], progress=False)
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{mixture_folder}/{name}", tmp_path / "model")
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog again number " * 60)
    given = ("--model", str(tmp_path / "model"), "--data", str(tmp_path / "a.txt"), "--target-parameters", "down_proj")
    assert run(*given) == 0
    size = metrics(tmp_path / "out")["size"]
    assert (size["quantized_layers"], size["adapted_layers"]) == (2, 1)


def test_a_model_without_experts(run, tmp_path, hf_folder, capsys):
    assert run("--model", hf_folder, "--target-parameters", "down_proj") == 2
    assert "matches no weights of experts, and the model has none" in capsys.readouterr().err


def test_a_file_of_options(run, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    rest = [word for word in SMALL if word not in ("--rank", "4", "--quiet")]
    del rest[rest.index("--save-every")]  # its value went with rank's
    path.write_text("rank: 2\nsave-every: 0\nquiet: true\nlr: 1e-3\n")
    assert run("--config", str(path), small=rest) == 0
    options = metrics(tmp_path / "out")["options"]
    assert (options["rank"], options["save_every"], options["quiet"], options["lr"]) == (2, 0, True, 1e-3)
    path.write_text("held-out: 0.2\neval-data: nowhere.txt\n")
    assert run("--config", str(path), small=rest) == 2
    assert f"--config {path}: --eval-data and --held-out both say what to evaluate on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", "is quantized already, by 'gptq'; give the dense model"),
        (None, "is quantized already, by 'None'; give the dense model"),
        ("bitsandbytes", "is quantized by bitsandbytes, but not to 4 bits"),
    ],
)
def test_a_model_that_others_quantized(run, tmp_path, hf_folder, capsys, method, words):
    shutil.copytree(hf_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    assert run("--model", str(tmp_path / "model")) == 2
    assert words in capsys.readouterr().err
