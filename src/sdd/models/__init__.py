"""Language models: one block for every placement, presets, generation."""

from sdd.models.config import ModelConfig, MoEConfig
from sdd.models.generate import generate
from sdd.models.presets import ParameterCount, as_printed, count_parameters, model_presets
from sdd.models.transformer import LanguageModel

__all__ = [
    "LanguageModel",
    "MoEConfig",
    "ModelConfig",
    "ParameterCount",
    "as_printed",
    "count_parameters",
    "generate",
    "model_presets",
]
