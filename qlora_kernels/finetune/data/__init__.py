"""The data of a run: reading it, splitting it without leaks, and batches."""

from .batches import IGNORED, Batch, Example, Examples, Windows
from .chat import Chat
from .load import HELD_OUT, Data, load_data, split_text
from .read import Place
from .records import Records, read_records

__all__ = [
    "HELD_OUT",
    "IGNORED",
    "Batch",
    "Chat",
    "Data",
    "Example",
    "Examples",
    "Place",
    "Records",
    "Windows",
    "load_data",
    "read_records",
    "split_text",
]
