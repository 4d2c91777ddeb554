"""Logs to W&B at several processes, then tries a run that wandb refuses, and writes what each rank saw.

Usage: accelerate launch wandb_ranks.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.small import SmallTrainer
from trainloop import LoggingHook, TrainingError, WandbHook

out = Path(sys.argv[1])


def forward(self: SmallTrainer, batch: Any) -> Any:
    return self.model(batch[0]).pow(2).mean(), {"rank": self.accelerator.process_index}


trainer = SmallTrainer(
    4, workspace=out, forward_=forward, hooks_=lambda self: [LoggingHook(interval=2), WandbHook("a-project")]
)
trainer.train()
seen = {"run_id": trainer.state_dict()["wandb"]["run_id"]}
try:
    SmallTrainer(4, workspace=out, hooks_=lambda self: [WandbHook("a/b")]).train()
except TrainingError as ex:
    seen["refusal"] = str(ex)
(out / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
