"""The folder of checkpoints as a place on a disk: file operations, the lock, renames, and the removal of leftovers.

In: a folder. Out: the same folder with one name more or one fewer, never with half a checkpoint under a final name.
"""
