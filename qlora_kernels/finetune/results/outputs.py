"""The files of a run's output folder: their paths, and whether they can be written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ...errors import InputError
from ...models.adapter_files import WEIGHTS_NAME
from ...models.peft_config import CONFIG_NAME
from ...storage.atomic_folder import new_folder
from ...storage.leftovers import sweep_of
from ...storage.lock import claimed
from ..checkpoint import NAME


class Outputs:
    """Paths within an output folder.

    Attributes:
        adapter: a folder.
        metrics, plot, checkpoint: files.
        claim: the file that says which process has the folder, while one has.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.adapter = os.path.join(folder, "adapter")
        self.metrics = os.path.join(folder, "metrics.json")
        self.plot = os.path.join(folder, "loss.png")
        self.checkpoint = os.path.join(folder, NAME)
        self.claim = os.path.join(folder, ".running")

    def _files(self) -> list[str]:
        adapter = [os.path.join(self.adapter, name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
        return [self.metrics, self.plot, self.checkpoint, *adapter]

    def check_unobstructed(self, base: str | None) -> None:
        """Finds before the training what would stop a write after it: a file in a folder's place, or the reverse.

        Args:
            base: another folder of the run, or None.

        Raises:
            InputError: naming it.
        """
        for folder in (self.adapter, base):
            if folder is not None and os.path.lexists(folder) and not os.path.isdir(folder):
                raise InputError(f"{folder} cannot be written: it should be a folder, and is a file")
        for file in self._files():
            if os.path.isdir(file):
                raise InputError(f"{file} cannot be written: it should be a file, and is a folder")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other runs out of the folder, which exists.

        Raises:
            InputError: when another run has it, or it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(claimed(self.claim, f"the output folder {self.folder}"))
            except OSError as error:
                raise InputError(f"the output folder {self.folder} cannot be written: {error.strerror}") from None
            yield

    @contextlib.contextmanager
    def writable(self, cache: str | None) -> Iterator[None]:
        """Creates the folders that are missing and checks that all can be written; see
        :func:`qlora_kernels.storage.atomic_folder.new_folder`.

        Args:
            cache: another folder of the run, or None.

        Raises:
            InputError: naming the folder that cannot be written.
        """
        adapter = self.adapter if os.path.isdir(self.adapter) else None
        with contextlib.ExitStack() as stack:
            for folder in (self.folder, cache, adapter):
                if folder is None:
                    continue
                try:
                    stack.enter_context(new_folder(folder))
                except OSError as error:
                    raise InputError(f"the output folder {folder} cannot be written: {error.strerror}") from None
            yield

    def sweep(self) -> None:
        """Removes what killed writers left beside the files."""
        for file in self._files():
            sweep_of(os.path.abspath(file))
