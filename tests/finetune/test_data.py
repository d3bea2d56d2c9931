"""The data of a fine-tuning run: splitting, batches, reading."""

from __future__ import annotations

import csv
import itertools
import json

import pytest
import torch

pytest.importorskip("transformers")

from qlora_kernels.errors import InputError
from qlora_kernels.finetune import data, tiny


def records_in(path) -> data.Records:
    records, own_evaluation = data.read_records(data.Place(str(path)))
    assert own_evaluation is None
    return records


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
    examples = [data.Example([1, 2, 3, 4, 5], ((3, 5),)), data.Example([6, 7], ((1, 2),))]
    pairs = data.Examples(examples, 16, pad=0, seed=0)
    batch = next(pairs.sequential(2, 100))
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 4, 5], [7, -100, -100, -100]]
    assert batch.counted == 3


def test_jsonl_splits_without_repeating_examples(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i % 20} + 1 =", "completion": f" {i % 20 + 1}"} for i in range(100)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    loaded = data.load_data(str(path), tiny.encode, tiny.END, 32, 0.1, 0)
    held_out = {tuple(example.ids) for example in loaded.held_out.examples}
    assert loaded.train.examples
    assert not held_out & {tuple(example.ids) for example in loaded.train.examples}
    assert all(example.ids[-1] == tiny.END for example in loaded.train.examples)


def test_pairs_come_from_arrays_and_tables_too(tmp_path):
    """As from JSONL; once, an array and a table were text to train on."""
    pairs = [("one, two", 'three "quoted"\nlines'), ("é", "x" * 200_000)]
    rows = [{"prompt": prompt, "completion": completion, "source": "s"} for prompt, completion in pairs]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name, delimiter in (("a.csv", ","), ("a.TSV", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["source", "prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    limit = csv.field_size_limit()
    for name in ("a.json", "a.csv", "a.TSV"):
        assert records_in(tmp_path / name).rows == pairs, name
        assert data.load_data(str(tmp_path / name), tiny.encode, tiny.END, 32, 0.5, 0).summary["kind"] == "pairs"
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"prompt": "a", "completion": "b"}', r"a\.json: a JSON array of objects .* ends in \.txt"),
        ("a.json", "[", r"a\.json: not JSON"),
        ("a.json", "[1]", "element 1: expected an object"),
        ("a.json", '[{"prompt": "a"}]', "element 1: expected an object"),
        ("a.json", " ", "is empty; rows with"),
        ("a.json", "[]", "is empty; rows with"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.csv", "", "is empty; rows with"),
        ("a.csv", "prompt,completion\n", "is empty; rows with"),
        ("a.csv", "prompt,answer\na,b\n", "name the columns, .*among them, and has prompt, answer"),
        ("a.csv", "prompt,completion\na\n", "line 2: expected an object"),
        ("a.csv", 'prompt,completion\na,"b\n', "unexpected end of data"),
        ("a.tsv", "prompt,completion\na,b\n", "'prompt' and 'completion', .* among them"),
    ],
)
def test_arrays_and_tables_that_hold_no_pairs(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        data.load_data(str(tmp_path / name), tiny.encode, tiny.END, 32, 0.5, 0)


def test_a_pair_that_is_too_long_keeps_some_of_both(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "p" * 50 + str(i), "completion": "c" * 50}) for i in range(4)))
    loaded = data.load_data(str(path), tiny.encode, tiny.END, 32, 0.25, 0)
    for example in loaded.train.examples:
        assert len(example.ids) == 33
        assert 8 <= example.prompt <= 24
        assert example.spans == ((example.prompt, 33),)


def test_a_byte_order_mark_and_half_a_character(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\ud800", "completion": "b"}')
    assert records_in(path).rows == [("a?", "b")]


def test_byte_tokenizer_agrees_with_plain_bytes():
    text = "def f(x):\n\treturn 'é☃ \U0001f600'  # \x00\r\n"
    tokenizer = tiny.tokenizer()
    assert tokenizer(text)["input_ids"] == tiny.encode(text)
    assert tokenizer.decode(tiny.encode(text)) == text
    assert tokenizer.eos_token_id == tiny.END
