"""The work of the command line on checkpoints, in one process without a trainer.

In: folders, perhaps damaged ones. Out: tables, exported files, and fewer checkpoints if the user asks for that.
"""
