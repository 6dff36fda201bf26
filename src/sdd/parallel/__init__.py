"""One model shared by many processes: layouts and their mesh, tensor and context parallelism.

`ColwiseSDD`, `RowwiseSDD` and `ShardedNorm` are styles for torch's `parallelize_module`; `parallelize` cuts our own
language models, and `share_sequences` their sequences. `sdd train` needs none of them by name: `--parallel.tensor 2`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdd.parallel.layout import ParallelConfig, layouts

if TYPE_CHECKING:
    from sdd.parallel.context import share_sequences
    from sdd.parallel.language_model import parallelize
    from sdd.parallel.mesh import build_mesh
    from sdd.parallel.norms import sharded_norm, sharded_scaled_norm
    from sdd.parallel.styles import ColwiseSDD, RowwiseSDD, ShardedNorm

__all__ = [
    "ColwiseSDD",
    "ParallelConfig",
    "RowwiseSDD",
    "ShardedNorm",
    "build_mesh",
    "layouts",
    "parallelize",
    "sharded_norm",
    "sharded_scaled_norm",
    "share_sequences",
]

_HOMES = {
    "context": ("share_sequences",),
    "language_model": ("parallelize",),
    "mesh": ("build_mesh",),
    "norms": ("sharded_norm", "sharded_scaled_norm"),
    "styles": ("ColwiseSDD", "RowwiseSDD", "ShardedNorm"),
}


def __getattr__(name: str) -> Any:
    """Import what needs torch's DTensor, which takes seconds, when it is first used."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"sdd.parallel.{home}"), name)
    raise AttributeError(f"module 'sdd.parallel' has no attribute {name!r}")
