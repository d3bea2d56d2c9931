"""Folders with a data set, Parquet files, and evaluation on other data."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from qlora_kernels.errors import InputError
from qlora_kernels.finetune import data, tiny
from qlora_kernels.finetune.data import Place, read_records


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(start, start + count)]


def lines(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def load(path, eval_path=None, held_out=None, seq_len=32):
    return data.load_data(str(path), tiny.encode, tiny.END, seq_len, held_out, 0, eval_path)


def texts(examples: data.Examples) -> set[str]:
    return {bytes(i for i in example.ids if i < 256).decode() for example in examples.examples}


def both(rows) -> set[str]:
    return {row["prompt"] + row["completion"] for row in rows}


MESSAGES = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes", "tool_calls": None}]}
    for i in range(5)
]


@pytest.mark.parametrize("rows", [pairs(5), MESSAGES, [{"text": "a line"}, {"text": ""}, {"text": "another"}]])
def test_a_data_set_that_datasets_saved(tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("pyarrow")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"), num_shards=2)
    lines(tmp_path / "rows.jsonl", rows)
    saved, none = read_records(Place(str(tmp_path / "set")))
    plain, _ = read_records(Place(str(tmp_path / "rows.jsonl")))
    assert none is None
    assert saved.kind == plain.kind
    without_places = [vars(row) | {"where": ""} if saved.kind == "messages" else row for row in saved.rows]
    assert without_places == [vars(r) | {"where": ""} if plain.kind == "messages" else r for r in plain.rows]


def test_splits_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": pairs(6), "test": pairs(2, 10)}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    made.save_to_disk(str(tmp_path / "set"))
    loaded = load(tmp_path / "set")
    assert (texts(loaded.train), texts(loaded.held_out)) == (both(parts["train"]), both(parts["test"]))
    assert loaded.fraction is None
    given = load(tmp_path / "set", held_out=0.5)  # the user's word counts more
    assert texts(given.train) | texts(given.held_out) == both(parts["train"])
    assert given.fraction == 0.5


def test_a_file_of_a_saved_data_set_holds_rows_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(pairs(6)).save_to_disk(str(tmp_path / "set"))
    (file,) = (tmp_path / "set").glob("*.arrow")
    loaded = load(file)
    assert texts(loaded.train) | texts(loaded.held_out) == both(pairs(6))
    (tmp_path / "other.arrow").write_bytes(b"words " * 100)
    with pytest.raises(InputError, match=r"other\.arrow cannot be read"):
        load(tmp_path / "other.arrow")


def test_evaluation_on_a_data_set_without_a_split_to_train_on(tmp_path):
    path = lines(tmp_path / "a.jsonl", pairs(6))
    for name, rows in (("test", pairs(2, 10)), ("validation", pairs(3, 20))):
        lines(tmp_path / "set" / f"{name}.jsonl", rows)
    assert texts(load(path, str(tmp_path / "set")).held_out) == both(pairs(3, 20))
    (tmp_path / "set" / "validation.jsonl").unlink()
    assert texts(load(path, str(tmp_path / "set")).held_out) == both(pairs(2, 10))
    alone = load(tmp_path / "set")  # the only split: to train on, and a part of it held out
    assert not texts(alone.train) & texts(alone.held_out)
    (tmp_path / "set" / "notes.txt").write_text("words " * 100)
    with pytest.raises(InputError, match=r"holds a data set \(test.jsonl\) and text files \(notes.txt\)"):
        load(path, str(tmp_path / "set"))


def test_parquet_as_the_hub_stores_it(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    parts = {"train-00000-of-00002": pairs(3), "train-00001-of-00002": pairs(3, 3), "validation-00000": pairs(2, 9)}
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text("# A data set")
    for name, rows in parts.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "data" / f"{name}.parquet")
    loaded = load(tmp_path / "set")
    assert (texts(loaded.train), texts(loaded.held_out)) == (both(pairs(6)), both(pairs(2, 9)))
    alone = load(tmp_path / "set" / "data" / "train-00000-of-00002.parquet")
    assert texts(alone.train) | texts(alone.held_out) == both(pairs(3))


@pytest.mark.parametrize("names", [("train.jsonl", "dev.jsonl"), ("train/a.jsonl", "test/a.jsonl"), ("a.jsonl", None)])
def test_lines_as_the_hub_stores_them(tmp_path, names):
    lines(tmp_path / "set" / names[0], pairs(6))
    if names[1]:
        lines(tmp_path / "set" / names[1], pairs(2, 10))
    loaded = load(tmp_path / "set")
    if names[1]:
        assert (texts(loaded.train), texts(loaded.held_out)) == (both(pairs(6)), both(pairs(2, 10)))
    else:
        assert texts(loaded.train) | texts(loaded.held_out) == both(pairs(6))
        assert loaded.fraction == 0.1


def test_the_validation_split_comes_before_the_test_split(tmp_path):
    for name, rows in (("train", pairs(4)), ("test", pairs(2, 10)), ("validation", pairs(2, 20))):
        lines(tmp_path / "set" / f"{name}.jsonl", rows)
    assert texts(load(tmp_path / "set").held_out) == both(pairs(2, 20))


def test_a_folder_of_texts_stays_one(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(list(range(300))))
    (tmp_path / "b.py").write_text("x = 1\n" * 100)
    assert load(tmp_path).summary["kind"] == "text"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"main/train.jsonl": pairs(2), "other/train.jsonl": pairs(2)}, "holds several data sets, main, other; name"),
        ({"train.jsonl": pairs(2), "train.csv": []}, "files of several kinds, .csv, .jsonl"),
        ({"test.jsonl": pairs(2), "dev.jsonl": pairs(2)}, "has no split 'train', only validation, test; name"),
        (
            {"train.jsonl": pairs(2), "notes.txt": ["x"]},
            r"holds a data set \(train.jsonl\) and text files \(notes.txt\)",
        ),
        (
            {"train.jsonl": [{"question": "a", "answer": "b"}]},
            "train.jsonl, line 1: .* found the keys question, answer",
        ),
        (
            {"state.json": [{"_data_files": [{"filename": "../x.arrow"}]}]},
            "_data_files should be a list of plain names",
        ),
        ({"state.json": [{"_data_files": [{"filename": "x.parquet"}]}]}, "is no .arrow file"),
        ({"state.json": [{"_data_files": [{"filename": "x.arrow"}]}]}, "x.arrow cannot be read"),
        ({"state.json": [{"_data_files": [{"filename": "x.arrow"}]}], "x.arrow": [1]}, "x.arrow cannot be read"),
        ({"state.json": [{}]}, "_data_files should be a list of plain names"),
        ({"dataset_dict.json": [{"splits": ["/etc"]}]}, "splits should be a list of plain names"),
        ({"dataset_dict.json": [{"splits": ["train"]}]}, "state.json"),
        ({"dataset_dict.json": [[]]}, "dataset_dict.json should hold a JSON object"),
        ({"train.parquet": [1]}, "train.parquet cannot be read"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, files, words):
    pytest.importorskip("pyarrow")
    for name, rows in files.items():
        lines(tmp_path / "set" / name, rows)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "set")


def test_damaged_files_are_exceptions(tmp_path):
    pytest.importorskip("pyarrow")
    import random

    import pyarrow
    import pyarrow.parquet

    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "state.json", [{"_data_files": [{"filename": "x.arrow"}]}])
    table = pyarrow.Table.from_pylist(MESSAGES)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with (
        pyarrow.OSFile(str(tmp_path / "set" / "x.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    generator = random.Random(0)
    refused = 0
    for path, place in ((tmp_path / "x.parquet",) * 2, (tmp_path / "set" / "x.arrow", tmp_path / "set")):
        whole = path.read_bytes()
        for _ in range(150):
            changed = bytearray(whole)
            for _ in range(generator.choice((1, 3, 10))):
                changed[generator.randrange(len(changed))] = generator.randrange(256)
            path.write_bytes(changed[: generator.choice((len(changed), generator.randrange(len(changed))))])
            try:
                read_records(Place(str(place)))
            except InputError:
                refused += 1
    assert refused > 100


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    lines(tmp_path / "train.parquet", [1])
    with pytest.raises(InputError, match="need the package 'pyarrow': pip install pyarrow"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------- evaluation elsewhere


def test_evaluation_on_a_file_of_its_own(tmp_path):
    path = lines(tmp_path / "a.jsonl", pairs(10))
    other = lines(tmp_path / "b.jsonl", [*pairs(2, 20), *pairs(1)])
    loaded = load(path, other)
    assert (texts(loaded.train), texts(loaded.held_out)) == (both(pairs(10)), both([*pairs(2, 20), *pairs(1)]))
    assert loaded.summary["held_out_in_training"] == 1
    assert (loaded.summary["eval_source"], loaded.fraction) == (other, None)
    assert load(path, lines(tmp_path / "b.jsonl", pairs(2, 20))).summary["sha256"] != loaded.summary["sha256"]


def test_training_on_text_and_evaluating_on_pairs_and_the_reverse(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some words\n" * 100)
    path = lines(tmp_path / "b.jsonl", pairs(4))
    loaded = load(text, path)
    assert isinstance(loaded.train, data.Windows)
    assert texts(loaded.held_out) == both(pairs(4))
    loaded = load(path, str(text))
    assert isinstance(loaded.held_out, data.Windows)
    assert len(loaded.held_out.tokens) == 1101
    with pytest.raises(InputError, match=r"--eval-data .*nowhere\.txt: no such file"):
        load(path, str(tmp_path / "nowhere.txt"))
    (tmp_path / "bad.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"--eval-data .*bad\.jsonl, line 1: expected an object"):
        load(path, str(tmp_path / "bad.jsonl"))


def test_documents_are_held_out_whole(tmp_path):
    rows = [{"text": f"document {i % 20} with a few words"} for i in range(60)]
    loaded = load(lines(tmp_path / "a.jsonl", rows), seq_len=8)
    held_out, training = (
        set(bytes(i if i < 256 else 0 for i in one.tokens.tolist()).decode().strip("\0").split("\0"))
        for one in (loaded.held_out, loaded.train)
    )
    assert held_out
    assert not held_out & training
    assert held_out | training == {row["text"] for row in rows}
