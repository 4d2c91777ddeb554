"""The format of a checkpoint on the disk: names, manifest, tensor files, checksums.

This package reads single files and changes nothing.
In: the bytes of one file, or the records to write into one.
Out: checked records (`Manifest`, `TensorFile`), or the problems that were found.
"""
