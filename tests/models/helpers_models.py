"""Models small enough to test, drawn so that a misplaced norm or alpha shows."""

from typing import Any

import torch
from torch import Tensor

from sdd.models import LanguageModel, ModelConfig
from sdd.placement import Placement, placements


def tiny_config(placement: str | Placement, **changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "n_layers": 3,
        "d_model": 16,
        "d_ff": 20,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 29,
        "context": 12,
        "rope_theta": 100.0,
        "placement": placements[placement] if isinstance(placement, str) else placement,
    }
    return ModelConfig(**shape | changes)


def tiny_model(
    placement: str | Placement, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(tiny_config(placement, **changes))
    return redraw(model).to(dtype)


@torch.no_grad()
def redraw(model: LanguageModel) -> LanguageModel:
    """Multiply every alpha and norm weight by its own factor in [0.5, 1.5]; draw matrices so that outputs are about 1.

    (With std 0.02 and a width of 16, eps would outweigh every statistic.)
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.mul_(torch.rand_like(parameter) + 0.5)
        else:
            parameter.normal_(std=1.0 if name == "embed.weight" else parameter.shape[1] ** -0.5)
    return model


def drawn_tokens(config: ModelConfig, length: int | None = None, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.context), generator=generator)
