"""The state of the run.

In: the live model, optimizer, schedule, data position and random generators; or a checkpoint, ours or
another tool's.
Out: the content of a checkpoint; or the live objects with the saved values in them.
"""
