"""Rows of Parquet files, and of the Arrow files of a data set that was saved to disk, through pyarrow."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from ...errors import InputError, sentence
from ...storage.regular_file import open_regular

_BATCH = 1000  # rows that are Python objects at a time, before their text is taken out


def read_parquet(path: str, where: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        InputError: for a file that is none, or without pyarrow.
    """
    _require_pyarrow(where)
    with _readable(where), open_regular(path) as file:
        import pyarrow.parquet

        # Without threads and memory maps, a damaged file is an exception here and nowhere else.
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_BATCH, use_threads=False):
            yield from _rows(batch)


def read_arrow(path: str, where: str) -> Iterator[dict[str, Any]]:
    """The rows of a file in Arrow's streaming format, which ``datasets`` writes.

    Raises:
        InputError: for a file that is none, or without pyarrow.
    """
    _require_pyarrow(where)
    with _readable(where), open_regular(path) as file:
        import pyarrow

        with pyarrow.ipc.open_stream(file) as stream:
            for batch in stream:
                for begin in range(0, batch.num_rows, _BATCH):
                    yield from _rows(batch.slice(begin, _BATCH))


def _rows(batch: Any) -> list[dict[str, Any]]:
    batch.validate(full=True)  # offsets that leave their buffers would be followed
    twice = [name for name in batch.schema.names if batch.schema.names.count(name) > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}")
    return batch.to_pylist()


def _require_pyarrow(where: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise InputError(f"{where}: Parquet and Arrow files need the package 'pyarrow': pip install pyarrow") from None


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow raises errors of many types, Python's among them
        raise InputError(f"{where} cannot be read: {re.sub(r'[.]$', '', sentence(error))}") from None
