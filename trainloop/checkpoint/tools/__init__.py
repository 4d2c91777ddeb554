"""What the command line does with checkpoints, in one process without a trainer.

In: folders, perhaps damaged ones. Out: tables, exported files, and fewer checkpoints if that is what was asked for.
"""
