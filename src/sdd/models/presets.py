"""Model shapes by name, and how their parameters are counted."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from sdd.models.config import ModelConfig, MoEConfig
from sdd.models.transformer import LanguageModel
from sdd.nn import ExpertLinear, SDDExpertLinear
from sdd.optim_groups import param_groups

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

_PUBLISHED_MOE = ModelConfig(
    n_layers=32,
    d_model=1024,
    d_ff=512,
    n_heads=16,
    n_kv_heads=16,
    vocab_size=50_280,
    context=4096,
    rope_theta=10_000.0,
    tie_embeddings=True,
    moe=MoEConfig(n_experts=64, top_k=8),
)
_NANO = ModelConfig(n_layers=12, d_model=64, d_ff=176, n_heads=4, n_kv_heads=2, vocab_size=4096, context=128)

#: Shapes by name. nano, micro and moe-nano train on a CPU in minutes; their vocabulary is the built-in tokenizer's.
#: A token meets as many feed-forward parameters in moe-nano as in nano.
model_presets: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "nano": _NANO,
        "micro": ModelConfig(n_layers=8, d_model=256, d_ff=704, n_heads=4, n_kv_heads=2, vocab_size=4096, context=256),
        "581m": replace(_PUBLISHED, n_layers=8),
        "1b": replace(_PUBLISHED, n_layers=16),
        "1.5b": replace(_PUBLISHED, n_layers=24),
        "2b": replace(_PUBLISHED, n_layers=32),
        "moe-nano": replace(_NANO, d_ff=88, moe=MoEConfig(n_experts=8, top_k=2)),
        "moe-588m-3b": _PUBLISHED_MOE,
        "moe-1b-7b": replace(_PUBLISHED_MOE, n_layers=16, d_model=2048, d_ff=1024, tie_embeddings=False),
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
        matrices: projections in the blocks, routers and all experts included.
        embedding: the embedding, which is also the head when tied.
        head: the head when not tied, else 0.
        scales: every alpha and norm weight.
        routers: the part of `matrices` that is in routers.
        idle: the part of `matrices` that is in experts a token does not use; 0 in a dense model.
        idle_scales: the part of `scales` that is in such experts.
    """

    matrices: int
    embedding: int
    head: int
    scales: int
    routers: int = 0
    idle: int = 0
    idle_scales: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrices + self.embedding + self.head + self.scales

    @property
    def published(self) -> int:
        """Parameters as the published labels count them: matrices and embeddings, without norms and alphas.

        The 588M of `moe-588m-3b` leaves its routers out too.
        """
        return self.total - self.scales

    @property
    def active(self) -> int:
        """Parameters that a token uses: of the experts only the chosen ones, and the whole embedding."""
        return self.total - self.idle - self.idle_scales

    @property
    def published_active(self) -> int:
        """The part of `published` that a token uses."""
        return self.published - self.idle


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model on the meta device, i.e. without allocating it."""
    model = LanguageModel(config, device="meta")
    scales = sum(p.numel() for group in param_groups(model) if group["role"] == "alpha" for p in group["params"])
    embedding = model.embed.weight.numel()
    head = 0 if model.head is None else model.head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    matrices = total - embedding - head - scales
    if config.moe is None:
        return ParameterCount(matrices, embedding, head, scales)
    layers = [module for module in model.modules() if isinstance(module, ExpertLinear)]
    experts = sum(layer.weight.numel() for layer in layers)
    alphas = sum(layer.alpha.numel() for layer in layers if isinstance(layer, SDDExpertLinear))
    unused = config.moe.n_experts - config.moe.top_k
    return ParameterCount(
        matrices,
        embedding,
        head,
        scales,
        routers=config.n_layers * config.d_model * config.moe.n_experts,
        idle=experts // config.moe.n_experts * unused,
        idle_scales=alphas // config.moe.n_experts * unused,
    )
