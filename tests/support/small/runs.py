"""Short runs of the fine-tuning command: options, fixtures, and what it wrote."""

from __future__ import annotations

import gc
import json

import pytest
import torch

pytest.importorskip("transformers")

from qlora_kernels.cli.main import main
from qlora_kernels.finetune import run as run_module

SMALL = [
    *("--tiny-hidden", "64", "--tiny-layers", "1", "--tiny-seq-len", "32", "--pretrain-steps", "6"),
    *("--steps", "6", "--seq-len", "32", "--batch-size", "2", "--rank", "4"),
    *("--eval-tokens", "512", "--sample-tokens", "8", "--save-every", "4", "--quiet"),
]


@pytest.fixture(scope="session", name="cache")
def cache_fixture(tmp_path_factory):
    """A folder that keeps the pretrained base between tests. Freezes what is imported by then, so that each run's
    garbage collections skip it.
    """
    gc.collect()
    gc.freeze()
    yield str(tmp_path_factory.mktemp("cache"))
    gc.unfreeze()


@pytest.fixture(name="run")
def run_fixture(tmp_path, cache, monkeypatch):
    """Runs the command in this process, without its plot unless ``plot``; returns its exit code."""
    draw = run_module.plot_losses

    def call(*more, out="out", small=SMALL, cached=True, plot=False):
        monkeypatch.setattr(run_module, "plot_losses", draw if plot else lambda *_: None)
        where = ["--cache", cache] if cached else []
        return main(["finetune", *small, *where, "--out", str(tmp_path / out), *more])

    return call


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def losses(folder) -> dict[str, list[float]]:
    return {key: value["losses"] for key, value in metrics(folder)["results"].items() if "losses" in value}


def base_in(folder):
    [base] = [path for path in folder.iterdir() if path.name.startswith("tiny-base")]
    return base


@pytest.fixture(scope="session", name="hf_folder")
def hf_folder_fixture(tmp_path_factory) -> str:
    """A Llama with one layer and a tokenizer of words."""
    return _model_folder(tmp_path_factory, "Llama", tie_word_embeddings=True)


@pytest.fixture(scope="session", name="mixture_folder")
def mixture_folder_fixture(tmp_path_factory) -> str:
    """A Mixtral with one layer of four experts, and the same tokenizer."""
    return _model_folder(tmp_path_factory, "Mixtral", num_local_experts=4)


def _model_folder(tmp_path_factory, kind: str, **more) -> str:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = str(tmp_path_factory.mktemp("hf") / "model")
    words = [*("<unk>", "</s>", "the", "quick", "brown", "fox", "number"), *("jumps", "over", "lazy", "dog", "again")]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=1,
        bos_token_id=None,
        **more,
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().save_pretrained(folder)
    return folder
