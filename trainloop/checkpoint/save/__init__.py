"""One save: snapshot, write, vote, commit.

In: a `Content` on every rank. Out: one new checkpoint folder, or the same error on every rank and no folder.
"""
