"""Compiles what the GPU benchmark will run, beforehand and beside something else: `python -m benchmarks.gpu.warm`."""

from __future__ import annotations

import os
import sys

from .suite import ON_CPU, ON_GPU, warm_compile_cache

if __name__ == "__main__":
    os.nice(10)
    warm_compile_cache(ON_CPU if sys.argv[1:] == ["cpu"] else ON_GPU)
