"""Model shapes by name, and how their parameters are counted."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from sdd.models.config import ModelConfig
from sdd.models.transformer import LanguageModel

# The one reading of the published table that fits its labels: 4 key-value heads, 50,280 tokens, tied embeddings.
_PUBLISHED = ModelConfig(
    n_layers=16,
    d_model=2048,
    d_ff=8192,
    n_heads=32,
    n_kv_heads=4,
    vocab_size=50_280,
    context=4096,
    tie_embeddings=True,
)

#: Shapes by name. nano and micro train on a CPU in minutes; their vocabulary is the built-in tokenizer's.
model_presets: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "nano": ModelConfig(n_layers=12, d_model=64, d_ff=176, n_heads=4, n_kv_heads=2, vocab_size=4096, context=128),
        "micro": ModelConfig(n_layers=8, d_model=256, d_ff=704, n_heads=4, n_kv_heads=2, vocab_size=4096, context=256),
        "581m": replace(_PUBLISHED, n_layers=8),
        "1b": replace(_PUBLISHED, n_layers=16),
        "1.5b": replace(_PUBLISHED, n_layers=24),
        "2b": replace(_PUBLISHED, n_layers=32),
    }
)

PRINTED_SHAPES = ("581m", "1b", "1.5b", "2b")


def as_printed(name: str) -> ModelConfig:
    """A published shape exactly as its table prints it: 8 key-value heads and 100,278 tokens.

    Counted with tied embeddings these are 692M, 1179M, 1665M and 2152M parameters, not what the labels say.

    Raises:
        KeyError: if `name` is not one of the published shapes.
    """
    if name not in PRINTED_SHAPES:
        raise KeyError(name)
    return replace(model_presets[name], n_kv_heads=8, vocab_size=100_278)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by role.

    Attributes:
        matrices: projections in the blocks.
        embedding: the embedding, which is also the head when tied.
        head: the head when not tied, else 0.
        scales: every alpha and norm weight.
    """

    matrices: int
    embedding: int
    head: int
    scales: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.embedding + self.head + self.scales

    @property
    def published(self) -> int:
        """By the convention of the published labels: matrices and embeddings, without norms and alphas."""
        return self.total - self.scales


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model on the meta device, i.e. without allocating it."""
    model = LanguageModel(config, device="meta")
    scales = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    embedding = model.embed.weight.numel()
    head = 0 if model.head is None else model.head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    return ParameterCount(total - embedding - head - scales, embedding, head, scales)
