"""How a converted model is cut over torchtitan's mesh, in its own declarations.

Matrices are cut as torchtitan cuts Llama 3's. The norm of a column-parallel matrix has its features' scale, that of a
row-parallel one comes after the sum over processes, and norms of the residual stream see whole features.
"""

# pyright: reportMissingImports=false

from typing import Any

import spmd_types as spmd
from torchtitan.models.common.decoder_sharding import (
    colwise_config,
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    norm_config,
    set_decoder_sharding_config,
    set_dense_ffn_sharding,
    set_gqa_attention_sharding,
    set_gqa_inner_attention_local_map,
)
from torchtitan.protocols.sharding import ShardingConfig

#: The norms of a block, in the order in which they are computed.
BLOCK_NORMS = ("embed_norm", "attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")


def set_sharding(config: Any, *, enable_sp: bool) -> None:
    """Declare the sharding of a converted config, in place.

    Args:
        config: an `SDDModel.Config`.
        enable_sp: whether the tokens of the residual stream are shared by the processes of the tensor dimension.
    """
    set_decoder_sharding_config(config, enable_sp=enable_sp)
    stream = dense_sequence_parallel_placement() if enable_sp else dense_activation_placement(tp=spmd.I)
    whole = spmd.R if enable_sp else spmd.I
    for layer in config.layers:
        for name in BLOCK_NORMS:
            if (norm := getattr(layer, name)) is not None:
                norm.sharding_config = norm_config(enable_sp=enable_sp)
        attention, network = layer.attention, layer.feed_forward
        set_gqa_attention_sharding(attention, enable_sp=enable_sp)
        attention.qkv_linear.wv.sharding_config = colwise_config()
        set_gqa_inner_attention_local_map(attention.inner_attention)
        set_dense_ffn_sharding(network, attn_x_layout=stream, enable_sp=enable_sp)
        qkv = attention.qkv_linear
        for projection in (qkv.wq, qkv.wkv, qkv.wv, network.w1, network.w3):
            _hand_down(projection, of_norm=spmd.S(0), of_before=spmd.R)
        for projection in (attention.wo, network.w2):
            _hand_down(projection, of_norm=whole, of_before=spmd.S(0))


def _hand_down(projection: Any, *, of_norm: Any, of_before: Any) -> None:
    """Give the declaration of a matrix to the matrix of an `SDDLinear.Config`, and its norms their own."""
    if not hasattr(projection, "linear"):
        return
    projection.linear.sharding_config, projection.sharding_config = projection.sharding_config, None
    for norm, cut in ((projection.norm, of_norm), (projection.before, of_before)):
        if norm is not None and norm.scale_name is not None:
            shared = norm.group is not None and norm.width == norm.group
            states = {norm.scale_name: dense_param_placement(tp=spmd.R if shared else cut)}
            norm.sharding_config = ShardingConfig(state_shardings=states)
