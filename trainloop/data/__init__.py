"""The data of a run: sharding, order, and position.

In: the return value of `build_data_loader`, the seed, and the number of processes.
Out: an endless stream of this rank's micro-batches on its device, with each sample once an epoch; and the position in
the stream, which checkpoints save.
"""

from .bad_samples import SkipBadSamples
from .mixture import Mixture
from .per_rank import per_rank
from .shares import Shardable
from .token_files import write_tokens
from .tokens import TokenDataset

__all__ = ["Mixture", "Shardable", "SkipBadSamples", "TokenDataset", "per_rank", "write_tokens"]
