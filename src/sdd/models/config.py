"""The shape of a language model."""

from dataclasses import dataclass, field
from typing import Literal

from sdd.placement import Placement, placements

#: Far more blocks than any model has. A larger number is a typing error, and building them would take for ever.
_MOST_LAYERS = 100_000
#: A smaller std than float32 can hold becomes 0.
_LEAST_INIT_SCALE = 1e-38


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of each block's feed-forward network, see `sdd.models.moe`.

    Attributes:
        n_experts: number of experts E of a block, each d_ff wide.
        top_k: experts that a token uses.
        d_shared: hidden width of a feed-forward network that every token uses too; 0 for none.
        renormalise: divide a token's routing weights by their sum.
        balance_loss: weight of the load balancing loss.
        router_z_loss: weight of the router z-loss.
    """

    n_experts: int
    top_k: int
    d_shared: int = 0
    renormalise: bool = False
    balance_loss: float = 0.01
    router_z_loss: float = 0.001

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k={self.top_k} must be between 1 and n_experts={self.n_experts}")
        for name in ("d_shared", "balance_loss", "router_z_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer with RoPE, grouped-query attention and SwiGLU.

    Attributes:
        n_layers: number of blocks L.
        d_model: width of the residual stream.
        d_ff: hidden width of the feed-forward network; of one expert in a mixture.
        n_heads: number of query heads.
        n_kv_heads: number of key and value heads; divides n_heads.
        vocab_size: number of tokens.
        context: longest sequence in tokens.
        rope_theta: base of the rotary angles.
        tie_embeddings: use the embedding matrix as the head.
        init_scale: multiplies the initial std of every matrix and of the embedding.
        eliminate_norms: leave out norms that every reader cancels, where the fused kernels run: the same function and
            gradients, up to rounding, in less time (see `sdd.models.elimination`).
        statistics: dtype in which norms are computed, whatever that of the activations. "bfloat16" rounds at every step
            of a norm, to study what that does: it runs no fused kernels.
        placement: where the norms stand: a name on the command line, the whole definition in config.json.
        moe: the mixture of experts; none for a dense model.
    """

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    context: int
    rope_theta: float = 500_000.0
    tie_embeddings: bool = False
    init_scale: float = 1.0
    eliminate_norms: bool = True
    statistics: Literal["float32", "bfloat16"] = "float32"
    placement: Placement = field(default_factory=lambda: placements["sdd"])
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "vocab_size", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_layers > _MOST_LAYERS:
            raise ValueError(f"n_layers={self.n_layers} must be at most {_MOST_LAYERS}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide d_model={self.d_model}: heads need one width")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} (d_model / n_heads) must be even: RoPE rotates pairs")
        if not 0 < self.init_scale < float("inf") or not 0 < self.rope_theta < float("inf"):
            raise ValueError(
                f"init_scale={self.init_scale} and rope_theta={self.rope_theta} must be positive and finite"
            )
        if self.init_scale < _LEAST_INIT_SCALE:
            raise ValueError(f"init_scale={self.init_scale} must be at least {_LEAST_INIT_SCALE}: weights would be 0")
        if self.statistics not in ("float32", "bfloat16"):
            raise ValueError(f"statistics={self.statistics!r}: choose float32 or bfloat16")
        self.placement.check_depth(self.n_layers)
        if self.moe is not None:
            self._check_experts()

    def _check_experts(self) -> None:
        """Raise ValueError if the placement has something that experts do not."""
        placement, name = self.placement, self.placement.name or "own placement"
        scaled = [site for site in ("gate", "up") if site in placement.scales]
        layers = (placement.layer(index, self.n_layers) for index in range(self.n_layers))
        bare = {
            site for norms in layers for site in ("gate", "up", "ffn_out") if site in norms and not norms[site].scale
        }
        if scaled or bare:
            what = f"a learned scale at {', '.join(scaled)}" if scaled else f"a norm without alpha at {', '.join(bare)}"
            raise ValueError(f"{name} has {what}, which experts do not know: choose another placement or a dense model")

    @property
    def head_dim(self) -> int:
        """Width of one head, d_model / n_heads."""
        return self.d_model // self.n_heads

    @property
    def kv_width(self) -> int:
        """Width of all key heads together."""
        return self.n_kv_heads * self.head_dim
