"""One load: choose a checkpoint, verify it, and read each rank's part.

In: a folder and the requested checkpoint. Out: a `Checkpoint`, the same one on every rank.
"""
