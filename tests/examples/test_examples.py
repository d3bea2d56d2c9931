"""The files in examples/, each run whole, on a tiny Llama in place of a download."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import peft
import pytest
import torch
from small.llama import CONFIG, transformers
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ByteTokenizer:
    """The part of a tokenizer that the examples use: a token is a byte."""

    def __call__(self, text: str, return_tensors: str | None = None):
        ids = [byte % CONFIG.vocab_size for byte in text.encode()]
        return transformers.BatchEncoding({"input_ids": torch.tensor([ids]) if return_tensors else ids})


@pytest.fixture
def model_and_text(tmp_path, monkeypatch):
    """A folder with a tiny Llama, as from_pretrained takes it, and a text."""
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: ByteTokenizer())
    return str(tmp_path / "model"), str(tmp_path / "text.txt")


def assert_an_adapter_of_the_model(folder: Path, model: str) -> None:
    """The adapter is there and does something, as PEFT sees it."""
    dense = transformers.LlamaForCausalLM.from_pretrained(model)
    tokens = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        before = dense(tokens).logits
        after = peft.PeftModel.from_pretrained(dense, folder)(tokens).logits
    assert not torch.equal(before, after)


def test_finetune(tmp_path, model_and_text, capsys):
    losses = example("finetune").main(*model_and_text, str(tmp_path / "adapter"), length=64)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert "14 linear layers quantized to NF4" in capsys.readouterr().out
    assert_an_adapter_of_the_model(tmp_path / "adapter", model_and_text[0])


def test_finetune_has_ten_lines():
    body = (FOLDER / "finetune.py").read_text().split("-> list[float]:\n")[1].split("\n\n\nif")[0].splitlines()
    for_the_test = ("losses", "return")
    assert len([line for line in body if not line.strip().startswith(for_the_test)]) == 10


def test_trainer(tmp_path, model_and_text):
    losses = example("trainer").main(*model_and_text, str(tmp_path / "adapter"), steps=30, length=64)
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    assert_an_adapter_of_the_model(tmp_path / "adapter", model_and_text[0])


def test_peft_adapters(tmp_path, model_and_text):
    losses = example("peft_adapters").main(*model_and_text, str(tmp_path / "adapter"), steps=30, length=64)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert_an_adapter_of_the_model(tmp_path / "adapter", model_and_text[0])


def test_bitsandbytes_checkpoint(tmp_path, model_and_text):
    from_pretrained = transformers.LlamaForCausalLM.from_pretrained
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = from_pretrained(model_and_text[0], quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    assert example("bitsandbytes_checkpoint").main(str(tmp_path / "theirs"), str(tmp_path / "ours")) == 0
    tokens = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        ours = from_pretrained(tmp_path / "ours")(tokens).logits
        # In eval mode bitsandbytes would round its constants to bfloat16 first.
        torch.testing.assert_close(ours, theirs.train()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_page_file(tmp_path, capsys):
    first, second = example("page_file").main(str(tmp_path / "states"))
    assert second < first < nn.functional.cross_entropy(torch.zeros(1, 256), torch.zeros(1, dtype=torch.long)).item()
    said = capsys.readouterr().out
    assert "of states, a memory-mapped file" in said
    assert float(re.search(r"([\d.]+) MiB of them in memory", said)[1]) == 0
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["model.pt", "optimizer.pt"]


def test_every_example_is_listed_and_tested():
    here = Path(__file__).read_text()
    for path in FOLDER.glob("*.py"):
        assert f"[{path.name}]({path.name})" in (FOLDER / "README.md").read_text()
        assert f'example("{path.stem}")' in here
