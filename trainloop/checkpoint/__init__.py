"""Checkpoints on the disk. A checkpoint is complete or doesn't exist. This package knows no trainer.

In: a folder, and a `Content` on every rank. Out: a new checkpoint in the folder, or a `Checkpoint` to read from.

The life of one save. Step 5 is due; x is a random token, so that two saves never share a name.

1. every rank, `hooks/checkpointing.py` `CheckpointingHook.save_if_due`: decides that the step is saved.
2. every rank, `state/saved.py` `content_of`: sorts the live state into weights, shards and nested values.
3. every rank, `checkpoint/store.py` `CheckpointStore.save`: waits for the save before. (`save_async` returns after
   line 7, and a thread does the rest.)
4. every rank, `checkpoint/save/saving.py` `Saving.start`: the ranks compare what they are about to save.
5. rank 0, `checkpoint/disk/fs.py` `FileSystem.make_dir`, if the space suffices. On the disk: `.tmp-step_0000005-x/`,
   empty.
6. every rank, `checkpoint/save/planning.py` `Planner.make`: decides which rank writes what, if that is not known yet.
7. every rank, `checkpoint/save/snapshot.py` `take_snapshot`: copies its part of the tensors to the CPU.
8. every rank, `checkpoint/save/saving.py` `Saving.finish`, which goes through lines 9 to 12.
9. every rank, `checkpoint/save/writer.py` `write_draft`: writes and syncs its files. In `.tmp-…/`: `model/`, `optim/`,
   `state/`. Then the ranks vote (`checkpoint/agreement.py` `Ranks.do`). If one has failed, rank 0 removes `.tmp-…/`,
   and every rank raises the same `CheckpointError`.
10. rank 0, `checkpoint/save/writer.py` `make_manifest`: checks that all ranks had the same plan.
11. rank 0, `checkpoint/format/layout.py` `manifest_texts`. In `.tmp-…/`: `tables.json`, then `manifest.json`, synced.
12. rank 0, `checkpoint/disk/housekeeping.py` `publish`: renames. On the disk: `step_0000005/`. This is the commit.
13. rank 0, `checkpoint/disk/housekeeping.py` `point_latest`. On the disk: the link `latest` names `step_0000005`.
14. rank 0, `checkpoint/retention.py` `to_delete`: chooses which older checkpoints go. This and line 15 run in a thread.
15. rank 0, `checkpoint/disk/housekeeping.py` `discard`: renames them to `.trash-step_…-x/`, then removes their files.

The life of one load, of the latest checkpoint. Only lines 2 to 4 change the disk.

1. every rank, `hooks/checkpointing.py` `CheckpointingHook.restore`, before the first step.
2. every rank, `checkpoint/store.py` `CheckpointStore.open`, for saves to come too. On the disk: the folder.
3. rank 0, `checkpoint/disk/lock.py` `FolderLock`. On the disk: `.lock`, held until the run ends.
4. rank 0, `checkpoint/disk/housekeeping.py` `clean_up`. On the disk: no `.tmp-…`, `.trash-…` and `.replaced-…` of a run
   that died. If it died between the two renames that replace a checkpoint, the old one has its name again.
5. every rank, `checkpoint/newest.py` `find_newest`: looks into the folders of all hooks; here there is one.
6. every rank, `checkpoint/store.py` `CheckpointStore.resolve`.
7. every rank, `checkpoint/load/loading.py` `find_latest`: tries one checkpoint after another, until one is whole.
8. rank 0, `checkpoint/format/catalog.py` `Catalog.latest`: orders them, the newest healthy one first.
9. rank 0, `checkpoint/format/catalog.py` `read_texts`: reads and checks the manifest. The others check the texts that
   rank 0 sends them.
10. every rank, `checkpoint/format/verification.py` `find_problems`: reads and checks its share of the files.
11. every rank, `state/training.py` `resume`, which goes through lines 12 to 16; the ranks vote after line 15.
12. every rank, `state/saved.py` `read_state`, which goes through lines 13 to 15.
13. every rank, `checkpoint/load/reader.py` `Checkpoint.global_state`: step, schedule, position in the data, hooks.
14. every rank, `checkpoint/load/reader.py` `Checkpoint.read_into`: compares names, shapes and dtypes with the live
    tensors, then reads the pieces that this rank holds into them.
15. every rank, `checkpoint/load/reader.py` `Checkpoint.rank_state`: its random generators and buffers.
16. every rank, `state/training.py` `load_run_state`: puts back optimizer, schedule and position.
"""

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
