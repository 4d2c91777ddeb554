"""Reads tensors from any number of files, even if a process may have only a few open."""

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
    """The files of a checkpoint that contain tensors, for reading in any order.

    An open file can be read to its end, even after the run has removed the checkpoint. So as many files stay open as
    half of the process's limit allows. Each other file is opened again whenever it is read.
    """

    def __init__(self, checkpoint: Checkpoint, records: Mapping[str, TensorRecord]) -> None:
        """Open and check each file once.

        Raises:
            CheckpointError: The run has removed the checkpoint, or a file does not match the manifest.
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
            checkpoint.check_there()  # if the checkpoint is gone, report that instead
            raise

    def read_into(self, path: str, key: str, offset: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes of a tensor, starting at `offset`.

        Raises:
            CheckpointError: The file cannot be read, or it was opened again and the run has removed the checkpoint.
        """
        if path not in self._open:
            try:
                self._files[path].continue_in(self._opened(path))
            finally:
                self._checkpoint.check_there()  # otherwise it could be a file of another commit
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
            # Close the newest: in repeated rounds over all files, the others are still open when needed again.
            self._open.popitem()[1].close()
        try:
            file = self._open[path] = open_regular(self._checkpoint.folder, path)
        except OSError as ex:
            raise self._unreadable(path, ex) from ex
        return file

    def _unreadable(self, path: str, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint.folder / path} cannot be read: {error.strerror or error}")
