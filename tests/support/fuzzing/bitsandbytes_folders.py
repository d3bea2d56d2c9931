"""Folders as save_pretrained writes them for models of bitsandbytes, and changes in the JSON that each weight has."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load, save

from qlora_kernels import quantize
from qlora_kernels.formats.bitsandbytes import STATE, to_bitsandbytes_state

from . import mutations as m
from .files import Files

KEYS = (
    *("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "absmax"),
    *("nested_absmax", "quant_map", "nested_quant_map", "quant_state"),
)
CONFIG_KEYS = (
    *("load_in_4bit", "_load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    *("bnb_4bit_quant_storage", "bnb_4bit_compute_dtype", "llm_int8_skip_modules"),
)
_VALUES = (
    *(*m.VALUES, 32, 64, 128, 256, 4096, 8192, "nf4", "fp4", "float32", [8, 8], [4, 8], [8, 4], [64], [1, 64]),
    *([1 << 62, 1 << 62], [1 << 40, 1 << 40], [10**400, 1], [-8, -8], [8.0, 8.0], [0, 8], [True, 64]),
)


def seeds(dense: Files) -> list[Files]:
    """Two folders of a dense one's model: NF4 with double quantization, and FP4 without, in blocks of 128."""
    content = dense["model.safetensors"]
    assert isinstance(content, bytes)
    config: dict[str, Any] = json.loads(dense["config.json"])  # type: ignore[arg-type]
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "llm_int8_skip_modules": ["lm_head"],
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    return [
        dense | {"config.json": m.dump(config), "model.safetensors": save(_in_4_bits(load(content), kind))}
        for kind in ("nf4", "fp4")
    ]


def _in_4_bits(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    written: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not key.endswith("_proj.weight"):
            written[key] = tensor
            continue
        weight = quantize(tensor.float(), double_quant=kind == "nf4")
        if kind == "fp4":
            magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
            weight = replace(weight, nested_table=torch.cat([magnitudes, -magnitudes]))
        state = to_bitsandbytes_state(weight, key)
        if kind == "fp4":
            text = f"{key}.{STATE}fp4"
            state[text] = _text(json.loads(bytes(state[text].tolist())) | {"blocksize": 128})
            state[f"{key}.absmax"] = state[f"{key}.absmax"][::2].contiguous()
        written |= state
    return written


def _text(value: Any) -> torch.Tensor:
    return torch.tensor(list(m.dump(value)), dtype=torch.uint8)


def quant_state(files: Files, rng: random.Random) -> str:
    """A change in the JSON object of one weight, or another text in its place."""
    name = "model.safetensors"
    try:
        tensors, metadata = m._unpack(m.content_of(files, name) or b"")
        key = rng.choice([key for key in tensors if STATE in key])
        value = json.loads(tensors[key][2])
        note = m.change_tree(value, rng, _VALUES, KEYS)
        text = m.dump(value)
        if rng.random() < 0.1:
            text = rng.choice(
                (b"", b"[]", b"1", b"null", text[:-1], text + text, b"[" * 60_000, b" " * 70_000, b"\xff")
            )
            note = f"the text {text[:20]!r}"
        tensors[key] = ("U8", [len(text)], text)
        files[name] = m._pack(tensors, metadata)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return ""
    return f"{key}: {note}" if note else ""
