"""Accelerate runs the devices, you write `forward`, and trainloop makes the run survive."""

from .errors import (
    CheckpointError,
    DataReplayWarning,
    LossNoneWarning,
    NonFiniteGradientError,
    RankDisagreementError,
    RedundantReadWarning,
    TrainingError,
    TrainloopWarning,
)
from .evaluation.collected import PerSample
from .hook import BaseHook
from .hooks.checkpointing import CheckpointingHook
from .hooks.cuda_memory import CudaMaxMemoryHook
from .hooks.early_stopping import EarlyStoppingHook
from .hooks.ema import EmaHook
from .hooks.evaluation import EvaluationHook
from .hooks.images import ImageFileLoggerHook
from .hooks.metrics_file import MetricsFileHook
from .hooks.profiler import ProfilerHook
from .hooks.stats import LoggingHook, ProgressHook
from .hooks.throughput import ThroughputHook
from .hooks.trackers import TrackerHook
from .hooks.wandb import WandbHook
from .ranks.samples import gather_samples
from .ready_made import Trainer
from .records import Records, flatten_nested_dict, key_average, map_nested_tensor
from .step.info import StepInfo, TrainingStats
from .trainer import BaseTrainer
from .version import __version__ as __version__

__all__ = [
    "BaseHook",
    "BaseTrainer",
    "CheckpointError",
    "CheckpointingHook",
    "CudaMaxMemoryHook",
    "DataReplayWarning",
    "EarlyStoppingHook",
    "EmaHook",
    "EvaluationHook",
    "ImageFileLoggerHook",
    "LoggingHook",
    "LossNoneWarning",
    "MetricsFileHook",
    "NonFiniteGradientError",
    "PerSample",
    "ProfilerHook",
    "ProgressHook",
    "RankDisagreementError",
    "Records",
    "RedundantReadWarning",
    "StepInfo",
    "ThroughputHook",
    "TrackerHook",
    "Trainer",
    "TrainingError",
    "TrainingStats",
    "TrainloopWarning",
    "WandbHook",
    "flatten_nested_dict",
    "gather_samples",
    "key_average",
    "map_nested_tensor",
]
