"""Communication between the ranks.

In: this rank's requests, and what it is doing at the moment.
Out: one answer that is the same on every rank; or an error that names the rank that is gone or disagrees.
"""
