"""Limits for reading a checkpoint, so that a hostile one can't use up all time or memory.

Saves have the same limits: a checkpoint that can't be loaded is never committed.
"""

MAX_JSON_BYTES = 2**28
"""Size of the manifest, and of each file of nested state."""
MAX_JSON_DEPTH = 100
"""Levels of mappings and lists in nested state."""
MAX_HEADER_BYTES = 100_000_000
"""Size of the header of a safetensors file; the same limit as safetensors' own."""
MAX_FILES = 2**17
"""Files in a checkpoint."""
MAX_TENSORS = 2**20
"""Tensors in a checkpoint; tied tensors count once for each name."""
MAX_DIMS = 64
"""Dimensions of a tensor; the same limit as torch's."""
MAX_TEXT = 4096
"""Characters of a path or another short text in the manifest."""
MAX_WHOLE = 2**63 - 1
"""Largest whole number in the manifest and in headers."""
