"""Checkpoints on the disk: whole or not there. Knows no trainer."""

from .content import Content
from .disk.fs import FileSystem
from .format.layout import Manifest, ManifestInfo
from .load.reader import Checkpoint
from .retention import (
    BestK,
    EverySeconds,
    KeepInterval,
    KeepPrevious,
    KeepSteps,
    RetentionPolicy,
    reasons_to_keep,
    to_delete,
)
from .store import CheckpointStore

__all__ = [
    "BestK",
    "Checkpoint",
    "CheckpointStore",
    "Content",
    "EverySeconds",
    "FileSystem",
    "KeepInterval",
    "KeepPrevious",
    "KeepSteps",
    "Manifest",
    "ManifestInfo",
    "RetentionPolicy",
    "reasons_to_keep",
    "to_delete",
]
