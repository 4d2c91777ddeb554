"""The hooks that come with trainloop, one concern a file.

In: the trainer, at each event of the run. Out: what goes beside training: checkpoints, averages, evaluations, logs.
"""
