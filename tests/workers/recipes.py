"""Runs a recipe of integrations/data, and writes what each rank has seen.

Usage: accelerate launch recipes.py RECIPE DATA WORKSPACE NUM_WORKERS MAX_STEPS
"""

from __future__ import annotations

import glob
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from trainloop import CheckpointingHook


def main() -> None:
    recipe, data, workspace, num_workers, max_steps = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("recipe", recipe)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Trainer(module.Trainer):  # type: ignore[misc, name-defined]
        def build_hooks(self) -> list[Any]:
            self.seen: list[int] = []
            return [CheckpointingHook(interval=int(max_steps))]

        def forward(self, batch: Any) -> Any:
            inputs = batch["input"] if isinstance(batch, dict) else batch[0]
            self.seen += inputs[:, 0].int().tolist()
            return super().forward(batch)

    source: Any = glob.glob(data) if "*" in data else data
    trainer = Trainer(source, int(num_workers), max_steps=int(max_steps), workspace=workspace, seed=0)
    trainer.train()
    weights = [value.tolist() for value in trainer.unwrapped_model.state_dict().values()]
    out = Path(workspace) / f"seen-{max_steps}-{trainer.accelerator.process_index}.json"
    out.write_text(json.dumps({"seen": trainer.seen, "weights": weights}))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
