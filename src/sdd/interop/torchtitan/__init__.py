"""Placements for torchtitan's Llama 3: the converter, what the trainer needs beside it, and its checkpoints.

    from sdd.interop.torchtitan import adamw, model_registry
    model_spec = model_registry("8B", "sdd")      # of a Trainer.Config
    optimizer = adamw(lr=3e-4)

Written for torchtitan 0.3.0. The page docs/torchtitan.md says what has been tested, and what torchtitan lacks.
"""

from sdd.errors import require_extra

require_extra("torchtitan", "torchtitan.models.llama3", needed_by="sdd.interop.torchtitan")

from sdd.interop.torchtitan.adapter import SDDStateDictAdapter, language_model  # noqa: E402
from sdd.interop.torchtitan.converter import SDDConverter  # noqa: E402
from sdd.interop.torchtitan.modules import Norm, SDDLinear, SDDModel  # noqa: E402
from sdd.interop.torchtitan.registry import adamw, model_registry, parallelize  # noqa: E402
from sdd.interop.torchtitan.shape import model_config  # noqa: E402

__all__ = [
    "Norm",
    "SDDConverter",
    "SDDLinear",
    "SDDModel",
    "SDDStateDictAdapter",
    "adamw",
    "language_model",
    "model_config",
    "model_registry",
    "parallelize",
]
