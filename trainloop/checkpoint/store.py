"""A folder of checkpoints: saves into it, finds checkpoints in it, and removes old ones. Knows no trainer."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..paths import parse_absolute_path
from .agreement import Ranks
from .best import parse_best
from .clock import Clock
from .content import Content
from .disk.fs import FileSystem
from .disk.housekeeping import discard, make_folder, point_latest, take_folder
from .disk.lock import FolderLock, is_visible
from .format.catalog import Catalog
from .format.layout import ManifestInfo, step_name
from .format.verification import VERIFY_LEVELS, Verify
from .load.loading import find_best, find_explicit, find_latest
from .load.reader import Checkpoint
from .retention import RetentionPolicy, describe_policies, to_delete
from .save.planning import Planner
from .save.saving import Saving
from .save.snapshot import Buffers


class CheckpointStore:
    """The checkpoints of one run in one folder. Make it on every rank. Call its methods on every rank unless they say
    otherwise.

    Example:
        ```python
        store = CheckpointStore("checkpoints")
        store.open()
        store.save(5, Content(weights={"model": model.state_dict()}), run_id="a")
        store.resolve("latest").read_into("model", model.state_dict())
        store.close()
        ```
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fs: FileSystem | None = None,
        logger: logging.Logger | None = None,
        timeout: timedelta | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            path: The folder. It need not exist.
            fs: The disk.
            logger: For messages to the user, on rank 0. None: the logger "trainloop".
            timeout: How long an async save waits for a rank that writes more slowly. None: 30 minutes.
            clock: Gives the commits their times. The times of stores that share a clock can be compared.
        """
        self.path = parse_absolute_path("path", path)
        self._fs = fs if fs is not None else FileSystem()
        self._logger = logger if logger is not None else logging.getLogger("trainloop")
        self._timeout = timeout if timeout is not None else timedelta(minutes=30)
        self.clock = clock if clock is not None else Clock()
        self._catalog = Catalog(self.path)
        self._buffers = Buffers()
        self._planner = Planner()
        self._lock: FolderLock | None = None
        self._is_open = False
        self._damaged: set[Path] = set()
        self._async_ranks: Ranks | None = None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self.last_seconds = 0.0
        """Seconds that the last successful save took, from its start until it was durable."""

    # ------------------------------------------------------------------ open and close

    def open(self) -> None:
        """Lock the folder for this run, and clean up after a run that died.

        Raises:
            CheckpointError: Another run holds the folder, it cannot be written to, or some rank doesn't see it.
        """
        if self._is_open:
            return
        ranks = Ranks()

        def take(_: Any) -> str:
            make_folder(self._fs, self.path)
            self._lock = take_folder(self._fs, self.path, self._logger)
            return self._lock.token

        def look() -> None:
            if not is_visible(self.path, token):
                raise CheckpointError(
                    f"{self.path.absolute()} on {platform.node()} is not the folder that rank 0 sees. Give a path that"
                    " all nodes share"
                )

        try:
            token = ranks.do(_nothing, take, f"{self.path} cannot hold this run's checkpoints")
            ranks.do(look, _nothing, f"{self.path} cannot hold this run's checkpoints")
        except CheckpointError:
            self._release()
            raise
        self._is_open = True

    def close(self) -> None:
        """Finish the save in flight, and release the folder and the memory.

        Raises:
            CheckpointError: The save in flight failed.
        """
        try:
            self.wait()
        finally:
            if self._async_ranks is not None:
                self._async_ranks.close()
                self._async_ranks = None
            self._buffers = Buffers()
            self._release()
            self._is_open = False

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # ------------------------------------------------------------------ save

    def save(
        self,
        step: int,
        content: Content,
        *,
        run_id: str,
        metrics: Mapping[str, Any] | None = None,
        retention: Iterable[RetentionPolicy] = (),
        extra: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        stopped_by: str = "",
    ) -> None:
        """Save, and return when the checkpoint is durable. A thread then removes old checkpoints. If a save is in
        flight, this waits for it first.

        Args:
            step: The step of the checkpoint. One of the same step is replaced.
            content: The content to save.
            run_id: Identifies the run.
            metrics: Numbers, nested or flat, by which checkpoints are compared.
            retention: Policies that choose checkpoints to keep, besides the newest and the newest healthy one. All
                others are removed.
            extra: Small texts to put into the checkpoint, by path: `{"model/config.json": ...}`. Those of rank 0 are
                written.
            settings: The run's settings by flat name, for comparison at a resume. Those of rank 0 are written.
            stopped_by: The name of whatever stopped the run with this checkpoint.

        Raises:
            CheckpointError: On every rank. It names the ranks that failed, and why. Earlier checkpoints are untouched.
        """
        self._join()
        start, policies = time.monotonic(), tuple(retention)
        saving, ranks = self._saving(step, run_id, metrics, policies, settings, stopped_by), Ranks()
        saving.start(content, extra or {}, self._buffers, ranks, copy=False)
        replaced = self._finish(saving, ranks)
        self.last_seconds = time.monotonic() - start
        if ranks.rank == 0:  # removing gigabytes takes time, and the other ranks would wait for rank 0
            self._start_thread(lambda: self._retain(saving, replaced, policies), saving)

    def save_async(
        self,
        step: int,
        content: Content,
        *,
        run_id: str,
        metrics: Mapping[str, Any] | None = None,
        retention: Iterable[RetentionPolicy] = (),
        extra: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        stopped_by: str = "",
    ) -> None:
        """As `save`, but return when `content` is copied; a thread does the rest. If a save is in flight, this waits
        for it first.

        `failed` reports errors that happen after the return, and `wait` raises them. Call `close` before the process
        ends.
        """
        self._join()
        if self._async_ranks is None:
            self._async_ranks = Ranks(self._timeout)
        start, policies = time.monotonic(), tuple(retention)
        saving, ranks = self._saving(step, run_id, metrics, policies, settings, stopped_by), self._async_ranks
        saving.start(content, extra or {}, self._buffers, Ranks(), copy=True)

        def finish() -> None:
            replaced = self._finish(saving, ranks)
            self.last_seconds = time.monotonic() - start
            if ranks.rank == 0:
                self._retain(saving, replaced, policies)

        self._start_thread(finish, saving)

    def wait(self) -> None:
        """Wait for the save in flight, and until old checkpoints are removed.

        Raises:
            CheckpointError: This save failed, or an earlier one did and the error was not raised yet.
        """
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def busy(self) -> bool:
        """Whether a save is in flight on this rank, or old checkpoints are being removed. Call on any rank."""
        return self._thread is not None and self._thread.is_alive()

    def failed(self) -> bool:
        """Whether an async save has failed. `wait` will raise the error. This doesn't wait; call on any rank."""
        return self._failure is not None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _saving(
        self,
        step: int,
        run_id: str,
        metrics: Mapping[str, Any] | None,
        retention: tuple[RetentionPolicy, ...],
        settings: Mapping[str, Any] | None,
        stopped_by: str,
    ) -> Saving:
        self.open()
        about = {
            "run_id": run_id,
            "metrics": _flat(metrics or {}),
            "retention": describe_policies(retention),
            "settings": settings or {},
            "stopped_by": stopped_by,
        }
        return Saving(self._fs, self._catalog, step, about, self.clock, self._lock, self._planner)

    def _finish(self, saving: Saving, ranks: Ranks) -> list[Path]:
        """Finish a save. Returns, on rank 0, the replaced checkpoint, which must be discarded."""
        replaced = saving.finish(ranks, self._logger)
        if ranks.rank == 0:
            self._quietly(lambda: point_latest(self._fs, self.path, saving.step, saving.token), "`latest` was not set")
        return replaced

    def _retain(self, saving: Saving, replaced: list[Path], retention: tuple[RetentionPolicy, ...]) -> None:
        """On rank 0: remove the checkpoints that are not needed after this commit."""
        complaint = "old checkpoints were not removed"

        def remove() -> None:
            self._damaged.discard(self.path / step_name(saving.step))
            # Damaged ones are neither counted nor removed: they must not take the place of an intact one.
            infos = [info for info in self.checkpoints() if self.path / step_name(info.step) not in self._damaged]
            superfluous = [self.path / step_name(step) for step in to_delete(infos, retention)]
            for folder in replaced:
                self._fs.remove_tree(folder)
            discard(self._fs, superfluous, saving.token)

        try:
            self._quietly(remove, complaint)
        except Exception as ex:  # from a user's policy, or a newer format: otherwise the disk would silently fill up
            raise CheckpointError(f"{self.path}: step {saving.step} is saved, but {complaint}: {ex!r}") from ex

    def _start_thread(self, work: Callable[[], None], saving: Saving) -> None:
        def run() -> None:
            try:
                work()
            except CheckpointError as ex:
                self._failure = ex
            except Exception as ex:  # nobody could catch an exception of the thread
                self._failure = CheckpointError(f"{saving.failure}: {type(ex).__name__}: {ex}")
                self._failure.__cause__ = ex

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def _quietly(self, action: Callable[[], None], complaint: str) -> None:
        """Do something that may fail, because the checkpoint is already safe."""
        try:
            action()
        except OSError as ex:
            self._logger.warning(f"{self.path}: {complaint}: {ex}")

    # ------------------------------------------------------------------ find

    def checkpoints(self) -> list[ManifestInfo]:
        """The information in the readable manifests, from the oldest commit to the newest. Call on any rank."""
        infos = self._catalog.infos()
        for info in infos:
            self.clock.go_to(info.time)
        return infos

    def resolve(self, which: int | str | Path, verify: Verify = "full") -> Checkpoint | None:
        """Find a checkpoint and verify it. The ranks share that work. Needs no `open`.

        Args:
            which: "latest": the newest healthy checkpoint with intact files; if none is healthy, the newest.
                "best:val/loss" or "best:val/accuracy:max": the one with the best value of a metric. Or a step. Or the
                path of any checkpoint.
            verify: "full": read every byte. "size": compare only sizes. "off": read only the manifest.

        Returns:
            The checkpoint. None: `which` is "latest", and there is no checkpoint.

        Raises:
            CheckpointError: On every rank. There are checkpoints, but all are damaged. Or the requested one doesn't
                exist or is damaged.
        """
        if verify not in VERIFY_LEVELS:
            raise ValueError(f"`verify` must be one of {', '.join(VERIFY_LEVELS)}, but is {verify!r}.")
        self._join()
        if which == "latest":
            found = find_latest(self._catalog, verify, self._logger)
        elif (best := parse_best(which)) is not None:
            found = find_best(self._catalog, best, verify, self._logger)
        else:
            found = find_explicit(self._catalog, which, verify)
        self._damaged |= found.damaged.keys()
        return found.checkpoint


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by flat name: `{"val": {"loss": 1.0}}` -> `{"val/loss": 1.0}`."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": float(value)}
    return flat


def _nothing(*_: Any) -> None:
    return None
