"""Where the run stands in its data.

In: whatever `build_data_loader` returns, the seed, and the number of processes.
Out: an endless stream of this rank's micro-batches on its device, each sample once an epoch, and the position in it,
which a checkpoint keeps.
"""

from .bad_samples import SkipBadSamples
from .mixture import Mixture
from .per_rank import per_rank
from .shares import Shardable
from .token_files import write_tokens
from .tokens import TokenDataset

__all__ = ["Mixture", "Shardable", "SkipBadSamples", "TokenDataset", "per_rank", "write_tokens"]
