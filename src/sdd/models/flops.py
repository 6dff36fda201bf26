"""Floating-point operations (FLOPs) of training one token.

A multiplication and an addition are two operations, and a matrix product's backward costs twice its forward:

    matrix products   6 * N                  N: parameters of the blocks' matrices and of the head; of experts, those
                                             of the k that a token uses
    attention         12 * L * d_model * T   q k^T and weights * v, T the context, no part of it masked

The look-up of embeddings, norms and other elementwise work are not counted (arXiv 2204.02311, appendix B).
"""

from dataclasses import dataclass

from sdd.models.config import ModelConfig
from sdd.models.presets import count_parameters


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of the forward and backward pass of one token.

    Attributes:
        matmul_parameters: N, the parameters that a token is multiplied with: the blocks' matrices, of experts those
            that it uses, and the head.
        matmul: `6 * N`.
        attention: `12 * L * d_model * T`: every token against all T, as model FLOPs are counted by convention.
        recomputed: forward work that the backward pass repeats; not counted among the model's FLOPs.
    """

    matmul_parameters: int
    matmul: int
    attention: int
    recomputed: int

    @property
    def model(self) -> int:
        """The FLOPs that model FLOPs utilisation (MFU) counts: matrix products and attention, nothing twice."""
        return self.matmul + self.attention

    @property
    def causal(self) -> int:
        """The model's FLOPs with only the half of the attention that a causal mask leaves."""
        return self.matmul + self.attention // 2

    @property
    def hardware(self) -> int:
        """The FLOPs that the machine executes: the model's and those of recomputation."""
        return self.model + self.recomputed


def training_flops(
    config: ModelConfig, *, checkpoint_blocks: bool = False, fused_attention: bool = False
) -> TrainingFlops:
    """FLOPs of one training token at the model's context.

    Args:
        config: the model.
        checkpoint_blocks: the backward pass repeats each block's forward pass: `2 * N_blocks + 4 * L * d_model * T`
            more, except for down projections whose output nothing keeps (no norm reads it).
        fused_attention: the attention kernel repeats `q k^T` in its backward pass: `2 * L * d_model * T` more.
    """
    count = count_parameters(config)
    matrices = count.matrices - count.idle
    matmul_parameters = matrices + config.vocab_size * config.d_model
    product = 2 * config.n_layers * config.d_model * config.context
    recomputed = product if fused_attention else 0
    if checkpoint_blocks:
        recomputed += 2 * (matrices - _not_recomputed(config)) + 2 * product
    return TrainingFlops(matmul_parameters, 6 * matmul_parameters, 6 * product, recomputed)


def _not_recomputed(config: ModelConfig) -> int:
    """Parameters of down projections that end their block: recomputation stops when all kept tensors are there."""
    layers = (config.placement.layer(index, config.n_layers) for index in range(config.n_layers))
    # the derivative of the routing weights needs the outputs of the experts; nothing needs the shared network's output
    width = config.d_ff if config.moe is None else config.moe.d_shared
    return sum(config.d_model * width for norms in layers if not {"ffn_out", "ffn_post"} & norms.keys())
