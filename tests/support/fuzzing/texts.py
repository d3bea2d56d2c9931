"""What is fuzzed of the readers of data: valid files, and what is done with what they hold."""

from __future__ import annotations

import functools
from pathlib import Path

from qlora_kernels.finetune import tiny
from qlora_kernels.finetune.data import Chat, Place, read_records

from . import mutations as m
from .files import Files

MESSAGE_KEYS = (
    *("messages", "conversations", "tools", "system", "role", "content", "from", "value", "weight", "tool_calls"),
    *("function", "name", "arguments", "id", "type", "text", "user", "assistant", "tool", "human", "gpt", "prompt"),
)


def pair_seeds() -> list[Files]:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "c\n", "more": [1]}]
    return [{"pairs.jsonl": b"\n".join(m.dump(row) for row in rows)}, {"pairs.jsonl": m.dump(rows[0])}]


def read_pairs(folder: Path) -> None:
    records, _ = read_records(Place(str(folder / "pairs.jsonl")))
    for row in records.rows:
        "".join(row if records.kind == "pairs" else ()).encode()


def message_seeds() -> list[Files]:
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "it is 2"},
            ],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        },
    ]
    shared = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"}
    return [{"messages.jsonl": b"\n".join(map(m.dump, rows))}, {"messages.jsonl": m.dump(shared)}]


# Writes everything that it is given, as templates for tools do.
_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def _chat() -> Chat:
    return Chat(tiny.tokenizer(), _TEMPLATE, "the template")


def read_messages(folder: Path) -> None:
    records, _ = read_records(Place(str(folder / "messages.jsonl")))
    if records.kind != "messages":
        return
    for row in records.rows:
        example = _chat().example(row)
        if not example.counted or example.spans[-1][1] > len(example.ids):
            raise AssertionError("a conversation without a token to learn, or with more than it has")
