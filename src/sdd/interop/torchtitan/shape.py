"""torchtitan's config in the words of ours, and what cannot be said in them."""

# pyright: reportMissingImports=false

from typing import Any

from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.dist_gemm import AllGatherFusedFeedForward
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3.model import Llama3Model

from sdd.errors import UserError, unknown
from sdd.models import ModelConfig
from sdd.placement import LEARNED_RESIDUAL, Placement, placements


def placement_of(placement: Placement | str) -> Placement:
    """The placement of this name, or the one given.

    Raises:
        UserError: if there is none of this name, or it has something that blocks of torchtitan cannot be given.
    """
    if isinstance(placement, str):
        if placement not in placements:
            raise unknown("placement", placement, list(placements))
        placement = placements[placement]
    name = placement.name or "own placement"
    lacking = {
        "learned scales without a norm": bool(placement.scales),
        f"the residual rule {LEARNED_RESIDUAL!r}": placement.residual == LEARNED_RESIDUAL,
        "weights of unit length": placement.weights == "unit",
    }
    if found := [what for what, there in lacking.items() if there]:
        raise UserError(f"{name} has {found[0]}, which sdd.interop.torchtitan does not have: choose another placement")
    return placement


def model_config(config: Any, placement: Placement | str | None = None) -> ModelConfig:
    """The shape of torchtitan's Llama 3 as that of a `LanguageModel`; RoPE's scaling is not part of it.

    Args:
        config: a `Llama3Model.Config`, converted or not.
        placement: None for that of a converted config.

    Raises:
        UserError: if it is not a dense Llama 3, has another head width than dim / n_heads, or does not fit the
            placement.
    """
    check_is_llama(config)
    layer = config.layers[0]
    width = getattr(layer.feed_forward.w1, "linear", layer.feed_forward.w1).out_features
    try:
        return ModelConfig(
            n_layers=len(config.layers),
            d_model=config.dim,
            d_ff=width,
            n_heads=layer.attention.n_heads,
            n_kv_heads=layer.attention.n_kv_heads or layer.attention.n_heads,
            vocab_size=config.vocab_size,
            context=config.max_seq_len,
            rope_theta=float(layer.attention.rope.theta),
            tie_embeddings=config.enable_weight_tying,
            placement=placement_of(config.placement if placement is None else placement),
        )
    except ValueError as error:
        raise UserError(f"the placement does not fit this model: {error}") from None


def check_is_llama(config: Any) -> None:
    """Raise UserError, which says what is in the way, if the config is not of a dense Llama 3."""
    if not isinstance(config, Llama3Model.Config):
        raise UserError(f"SDD placements are for torchtitan's Llama 3, not for {type(config).__qualname__}")
    for index, layer in enumerate(config.layers):
        attention, network = layer.attention, layer.feed_forward
        if (
            not isinstance(attention, GQAttention.Config)
            or not isinstance(network, FeedForward.Config)
            or isinstance(network, AllGatherFusedFeedForward.Config)
        ):
            raise UserError(
                f"layers.{index} has other parts than those of Llama 3 (mixture of experts or "
                "tp_gemm_backend='dist_gemm'): build the model without them"
            )
        if attention.head_dim not in (None, config.dim // attention.n_heads):
            raise UserError(f"layers.{index}.attention has head_dim={attention.head_dim}: only dim / n_heads is known")
        if attention.qk_norm is not None:
            raise UserError(f"layers.{index}.attention has a qk_norm of its own: name it in the placement instead")


def check_is_plain(config: Any) -> None:
    """Raise UserError if another converter has been here before, whose layers would be lost."""
    for name, found, _, _ in config.traverse(Linear.Config):
        if type(found) is not Linear.Config:
            raise UserError(f"{name} is a {type(found).__qualname__} already: put SDDConverter before other converters")
        if found.bias:
            raise UserError(f"{name} has a bias, which Llama 3 has not: build the model without it")
