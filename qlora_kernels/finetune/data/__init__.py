"""The data of a run: reading it, splitting it without leaks, and batches."""

from .batches import IGNORED, Batch, Pairs, Windows
from .load import Data, load_data, split_text
from .read import read_pairs

__all__ = ["IGNORED", "Batch", "Data", "Pairs", "Windows", "load_data", "read_pairs", "split_text"]
