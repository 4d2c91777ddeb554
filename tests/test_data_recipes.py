"""The recipes of integrations/data: each sample once an epoch, and a killed run goes on with the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .launching import NUM_PROCESSES, REPOSITORY, launch

N, BATCH, FILES = 48, 4, 6
"""`N` is a multiple of the global batch at 1, 2 and 3 ranks."""


def write_tar_files(folder: Path) -> str:
    import webdataset

    folder.mkdir()
    for file in range(FILES):
        with webdataset.TarWriter(str(folder / f"{file}.tar")) as tar:
            for i in range(file * N // FILES, (file + 1) * N // FILES):
                tar.write({"__key__": f"{i:06}", "input.npy": sample(i), "cls": i % 10})
    return str(folder / "*.tar")


def write_mosaic_shards(folder: Path) -> str:
    from streaming import MDSWriter

    columns = {"input": "ndarray:float32:4", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=400) as writer:
        for i in range(N):
            writer.write({"input": sample(i), "label": i % 10})
    return str(folder)


def sample(i: int) -> Any:
    return np.array([i, i % 2, i % 3, 1], dtype=np.float32)


RECIPES = {"web_dataset": ("webdataset", write_tar_files), "mosaic_streaming": ("streaming", write_mosaic_shards)}
SLOW = [("web_dataset", "single", 2), ("web_dataset", "ddp3", 0), ("web_dataset", "ddp2", 0)]


@pytest.mark.parametrize(
    ("recipe", "form", "num_workers"),
    [
        ("web_dataset", "ddp2", 2),
        ("mosaic_streaming", "ddp2", 0),
        ("mosaic_streaming", "ddp2", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_a_recipe_reads_each_sample_once_and_goes_on(tmp_path: Path, recipe: str, form: str, num_workers: int) -> None:
    """Over two epochs. A run to the middle of the second epoch and its resume see what one run sees, and end with the
    same weights, bit for bit.
    """
    package, write = RECIPES[recipe]
    pytest.importorskip(package)
    data, world_size = write(tmp_path / "data"), NUM_PROCESSES[form]
    steps = N // BATCH // world_size
    script = str(REPOSITORY / "integrations" / "data" / f"{recipe}.py")

    def run(workspace: str, max_steps: int) -> list[Any]:
        (tmp_path / workspace).mkdir(exist_ok=True)
        args = [script, data, str(tmp_path / workspace), str(num_workers), str(max_steps)]
        launch(REPOSITORY / "tests" / "workers" / "recipes.py", form, *args)
        return [
            json.loads((tmp_path / workspace / f"seen-{max_steps}-{rank}.json").read_text())
            for rank in range(world_size)
        ]

    whole = run("whole", 2 * steps)
    half = len(whole[0]["seen"]) // 2
    for epoch in (slice(half), slice(half, None)):
        assert sorted(number for own in whole for number in own["seen"][epoch]) == list(range(N))
    assert whole[0]["seen"][:half] != whole[0]["seen"][half:], "another order in each epoch"
    first, second = run("parts", steps + 2), run("parts", 2 * steps)
    for own, before, after in zip(whole, first, second, strict=True):
        assert before["seen"] + after["seen"] == own["seen"]
        assert after["weights"] == own["weights"]
