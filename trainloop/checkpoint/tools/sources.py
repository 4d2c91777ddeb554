"""Reads tensors out of any number of files, however few a process may have open."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from io import BufferedReader

from ...errors import CheckpointError
from ..format.files import open_regular
from ..format.tables import TensorRecord
from ..format.tensorfile import TensorFile
from ..format.verification import check_stored, stored_in
from ..load.reader import Checkpoint


class Sources:
    """The files of a checkpoint that hold tensors, to be read in any order.

    What is open can be read to the end, even after the run has removed the checkpoint. So as many files as half of the
    process's limit stay open. Any other is opened again for each visit.
    """

    def __init__(self, checkpoint: Checkpoint, records: Mapping[str, TensorRecord]) -> None:
        """Open and check each file once.

        Raises:
            CheckpointError: The run has removed the checkpoint, or a file does not hold what the manifest says.
        """
        self._checkpoint = checkpoint
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = math.inf if limit == resource.RLIM_INFINITY else max(1, limit // 2)
        self._open: dict[str, BufferedReader] = {}
        self._files: dict[str, TensorFile] = {}
        try:
            paths = {part.file for record in records.values() for part in record.parts()}
            for path, stored in sorted(stored_in(paths, records).items()):
                self._files[path] = TensorFile(self._opened(path), path)
                check_stored(self._files[path], stored)
        except CheckpointError:
            self.close()
            checkpoint.check_there()  # if it is gone, that is the reason
            raise

    def read_into(self, path: str, key: str, offset: int, memory: memoryview) -> None:
        """Fill memory with the bytes of a tensor from `offset` on.

        Raises:
            CheckpointError: The file cannot be read, or had to be opened again and the run has removed the checkpoint.
        """
        if path not in self._open:
            try:
                self._files[path].continue_in(self._opened(path))
            finally:
                self._checkpoint.check_there()  # else it could be a file of another commit
        try:
            self._files[path].read_into(key, offset, memory)
        except OSError as ex:
            raise self._unreadable(path, ex) from ex

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _opened(self, path: str) -> BufferedReader:
        if len(self._open) >= self._max_open:
            # The newest: in rounds over all files, the other ones are still open when their turn comes.
            self._open.popitem()[1].close()
        try:
            file = self._open[path] = open_regular(self._checkpoint.folder, path)
        except OSError as ex:
            raise self._unreadable(path, ex) from ex
        return file

    def _unreadable(self, path: str, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint.folder / path} cannot be read: {error.strerror or error}")
