"""What the ranks tell one another.

In: what this rank wants agreed on, and what it is doing at the moment.
Out: one answer that is the same on every rank; or an error that names the rank that is gone or disagrees.
"""
