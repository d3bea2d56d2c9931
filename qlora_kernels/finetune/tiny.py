"""The tiny model: byte-level, Llama-shaped, pretrained here on the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from ..console.quiet import quiet_transformers
from ..errors import InputError
from ..storage.atomic_folder import write_folder_atomically
from ..storage.formats import save_json
from .data import Windows
from .options import Settings
from .tiny_forward import speed_up
from .train import Phase, Trainer

END = 256  # id of <|endoftext|>; ids below it are bytes
_VOCABULARY = 272  # 257, and up to a multiple of 16 for the matrix units

#: The tiny model has seen no conversation; this is for trying out data. An assistant's turn ends as a document does.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- message.role + ": " }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{- message.content }}
        {%- if message.tool_calls %}{{- message.tool_calls | tojson }}{% endif %}{{- eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content + "\\n" }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- raise_exception("it has no place for tools") }}{% endif %}
{%- if add_generation_prompt %}{{- "assistant: " }}{% endif %}"""
_BATCH_SIZE = 8
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
_LEAST_BYTES = 500_000


def encode(text: str, document: bool = True) -> list[int]:
    """UTF-8 bytes."""
    return list(text.encode("utf-8", errors="replace"))


def tokenizer():
    """A Hugging Face tokenizer in which each byte is its own id; it makes the model's folder complete."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for characters above 255.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    alphabet = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def config(settings: Settings):
    """The model's shape: about 3.4 million parameters by default, every layer's K a multiple of 64."""
    from transformers import LlamaConfig

    hidden = settings.tiny_hidden
    return LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=round(hidden * 2.75 / 64) * 64,
        num_hidden_layers=settings.tiny_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        # Near 1 / sqrt(256), not the 0.02 of wide models: with it and a rate of 2e-3, 600 steps of pretraining left a
        # held-out loss of 2.00 nats per byte, with 0.02 and 1e-3 2.09.
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
        use_cache=True,
    )


def pretraining_text(seed: int) -> torch.Tensor:
    """The standard library's sources as byte tokens (int32), in an order that the seed decides.

    Raises:
        InputError: when this Python came without its sources.
    """
    root = sysconfig.get_paths()["stdlib"]
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED)
        names += [os.path.join(folder, name) for name in files if name.endswith(".py")]
    names.sort()
    random.Random(seed).shuffle(names)
    pieces = []
    for name in names:
        with open(name, "rb") as file:
            pieces += [np.frombuffer(file.read(), dtype=np.uint8).astype(np.int32), np.array([END], dtype=np.int32)]
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    if len(tokens) < _LEAST_BYTES:
        raise InputError(
            f"this Python has only {len(tokens)} bytes of library sources in {root}, too little to pretrain the tiny "
            "model; name another with --model"
        )
    return torch.from_numpy(tokens)


def cache_folder(settings: Settings) -> str:
    """The folder of the model that these settings pretrain, whether it exists yet or not."""
    key = {
        "format": 2,
        "hidden": settings.tiny_hidden,
        "layers": settings.tiny_layers,
        "seq_len": settings.tiny_seq_len,
        "steps": settings.pretrain_steps,
        "batch_size": _BATCH_SIZE,
        "optim": settings.optim,
        "lr": settings.pretraining_lr,
        "seed": settings.seed,
        "compute": str(settings.pretraining_dtype),
        "python": sys.version,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return os.path.join(settings.cache or settings.out, f"tiny-base-{digest}")


def pretrain(settings: Settings, trainer: Trainer, folder: str, note: Callable[[str], None]) -> None:
    """Trains the tiny model from scratch and writes it to ``folder``, a Hugging Face folder in bfloat16.

    Runs that share a cache and start together each pretrain a model; all continue from the one that is written first.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(settings.seed)
    # Any, because the annotations of transformers' to() are wrong.
    model = cast(Any, LlamaForCausalLM(config(settings))).to(settings.device)
    speed_up(model)
    count = sum(p.numel() for p in model.parameters())
    text = pretraining_text(settings.seed)
    size = f"{count / 1e6:.1f} M parameters on {len(text) / 1e6:.1f} MB of library sources"
    note(f"pretraining a byte-level model of {size}")
    dtype = settings.pretraining_dtype
    phase = Phase(
        name="pretrain",
        title="pretraining",
        model=model,
        data=Windows(text, settings.tiny_seq_len, settings.seed),
        lr=settings.pretraining_lr,
        steps=settings.pretrain_steps,
        batch_size=_BATCH_SIZE,
        autocast=dtype if dtype != torch.float32 else None,
        seconds=settings.pretrain_seconds,
    )
    trained = trainer.run(phase, note)
    losses = trained.losses[-20:]
    note(f"pretrained in {trained.seconds:.0f} s, training loss {sum(losses) / len(losses):.3f} nats per byte")

    def write(temporary: str) -> None:
        with quiet_transformers():
            model.to("cpu", torch.bfloat16).save_pretrained(temporary)
        tokenizer().save_pretrained(temporary)
        facts = {"steps": trained.steps, "seconds": trained.seconds, "losses": trained.losses}
        save_json(facts, os.path.join(temporary, "pretraining.json"))

    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with trainer.stop.deferred():
        try:
            write_folder_atomically(folder, write)
        except FileExistsError:
            # Folders appear whole or not at all, so the base that is there now can be used.
            note(f"another run has written the tiny base in {folder}; this one uses it")
    trainer.stop.check()
