"""Training: configs, loop, checkpoints, the files of a run."""

from sdd.train.config import DataConfig, OptimConfig, RunConfig, preset
from sdd.train.trainer import Trainer

__all__ = ["DataConfig", "OptimConfig", "RunConfig", "Trainer", "preset"]
