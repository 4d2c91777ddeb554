"""The state of the run.

In: the live model, optimizer, schedule, data position and random generators. Or a checkpoint, ours or another tool's.
Out: the content of a checkpoint. Or the live objects, with the saved values in them.
"""
