"""The folder of checkpoints on the disk: file operations, the lock, renames, and the removal of leftovers.

In: a folder. Out: the same folder with one checkpoint more or less. A final name never has a partial checkpoint.
"""
