"""The hooks that come with trainloop, one concern per file.

In: the trainer, at each event of the run. Out: everything beside training: checkpoints, averages, evaluations, logs.
"""
