"""One load: choose a checkpoint, verify it, read each rank's part.

In: a folder and which checkpoint is wanted. Out: a `Checkpoint`, the same one on every rank.
"""
