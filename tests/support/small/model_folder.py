"""A small Hugging Face folder, damaged copies of it, and the quickest run of the fine-tuning command."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

TINY = [
    *("--tiny-hidden", "64", "--tiny-layers", "1", "--tiny-seq-len", "32", "--pretrain-steps", "2"),
    *("--steps", "1", "--seq-len", "32", "--batch-size", "1", "--rank", "4"),
    *("--eval-tokens", "64", "--sample-tokens", "0", "--quiet"),
]


@pytest.fixture(scope="session", name="model")
def model_fixture(tmp_path_factory) -> str:
    """A Hugging Face folder: one Llama layer, byte-level tokenizer."""
    from transformers import LlamaForCausalLM

    from qlora_kernels.finetune import tiny
    from qlora_kernels.finetune.options import Options

    folder = str(tmp_path_factory.mktemp("models") / "model")
    torch.manual_seed(0)
    config = tiny.config(Options(tiny_hidden=64, tiny_layers=1))
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def damaged(model: str, folder, kind: str) -> str:
    """A copy of the model with something wrong."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-64])
    elif kind == "foreign":
        path.write_bytes(b"this is no safetensors file")
    elif kind == "no tokenizer":
        os.unlink(folder / "tokenizer.json")
        os.unlink(folder / "tokenizer_config.json")
    else:
        if kind == "not finite":
            tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("inf")
        elif kind == "incomplete":
            del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)
