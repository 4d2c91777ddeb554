"""The records that a run keeps about itself in its workspace: its lives, and the bits of each step.

```
events.jsonl               what has happened, written by rank 0 as it happens (`events`); its lives (`lives`)
ledger/rank_00000.bin …    the bits of each step, one file per rank (`ledger`); a resumed run compares them (`audit`)
```
"""

from .events import EVENTS, read_events
from .lives import Life, failure_times, failures_at_same_step, read_lives, split_runs

__all__ = ["EVENTS", "Life", "failure_times", "failures_at_same_step", "read_events", "read_lives", "split_runs"]
