"""Language models: one block for every placement, presets, generation."""

from sdd.models.config import ModelConfig, MoEConfig
from sdd.models.generate import generate, generate_stream
from sdd.models.kv_cache import KVCache
from sdd.models.presets import ParameterCount, as_printed, count_parameters, model_presets
from sdd.models.transformer import LanguageModel

__all__ = [
    "KVCache",
    "LanguageModel",
    "MoEConfig",
    "ModelConfig",
    "ParameterCount",
    "as_printed",
    "count_parameters",
    "generate",
    "generate_stream",
    "model_presets",
]
