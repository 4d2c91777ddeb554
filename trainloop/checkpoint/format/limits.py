"""The most that a reader accepts of a checkpoint, so that a hostile one takes neither all time nor all memory.

The same limits hold at the save: nothing is committed that cannot be loaded.
"""

MAX_JSON_BYTES = 2**28
"""Of the manifest and of each file of nested state."""
MAX_JSON_DEPTH = 100
"""Levels of mappings and lists in nested state."""
MAX_HEADER_BYTES = 100_000_000
"""Of the header of a safetensors file; safetensors itself reads no larger one."""
MAX_FILES = 2**17
"""In a checkpoint."""
MAX_TENSORS = 2**20
"""In a checkpoint, tied ones under each of their names."""
MAX_DIMS = 64
"""Of a tensor; torch has no more."""
MAX_TEXT = 4096
"""Characters of a path or another short text in the manifest."""
MAX_WHOLE = 2**63 - 1
"""Largest whole number in the manifest and in headers."""
