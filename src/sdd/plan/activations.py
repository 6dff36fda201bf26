"""What training keeps for the backward pass, counted from the placement's equations.

The model is written down once more as the operations of its composed path (`sdd.functional`), each with the tensors
that its derivative needs:

    operation             keeps
    y = W x               x
    norm(z) = z * r       z (float32) and r = 1/rms, one number a group
    alpha * n             n (float32)
    silu(g), s * u        g; s and u
    fused attention       q, k, v, the output, and one logsumexp a head; where it is not fused, T weights a head
    cross-entropy         log softmax(logits) (float32)

A tensor that several operations keep is kept once. Under bfloat16 autocast matrix products and attention are bfloat16,
norms and the residual stream float32, and each product casts its input for itself. All sizes are bytes a token.
"""

from dataclasses import dataclass

from sdd.models import ModelConfig
from sdd.placement import Norm, Site
from sdd.plan.tape import WIDE, Backward, Op, Tape, Tensor, kept


@dataclass(frozen=True)
class Activations:
    """Bytes a token of one forward and backward pass.

    Attributes:
        kept: what the model holds for the backward pass when the forward pass ends.
        loss_kept: what the loss holds then.
        loss: held on top of `kept`, at most, while the gradient of the loss is computed.
        block: held on top of `kept`, at most, while the gradients of the blocks are computed: what was recomputed,
            gradients and scratch. (Negative if more is let go of than comes.)
        parts: `kept` by part: norms, attention, feed-forward (matrix products and SwiGLU), projections (inputs of the
            attention's products), stream (inputs of checkpointed blocks), ends (embedding and final norm).
    """

    kept: float
    loss_kept: float
    loss: float
    block: float
    parts: dict[str, float]


def count_activations(
    config: ModelConfig,
    *,
    bfloat16: bool = False,
    checkpoint_blocks: bool = False,
    chunked_loss: bool = False,
    z_loss: bool = False,
    fused_attention: bool = True,
) -> Activations:
    """Count the activations of `LanguageModel`, its composed path, on sequences of `config.context` tokens.

    Args:
        config: the model.
        bfloat16: under autocast; else float32.
        checkpoint_blocks: each block keeps only its input, and is recomputed.
        chunked_loss: the loss keeps the gradient of its input, not the logits.
        z_loss: the loss has that term.
        fused_attention: by a kernel that never writes the T x T weights.
    """
    tape = Tape(2 if bfloat16 else WIDE, "ends")
    norms = config.placement.norms
    tokens = Tensor(1, 8)  # int64, kept by the embedding
    x = _norm(tape, norms.get("embed"), tape.record([], Tensor(config.d_model, WIDE), [tokens]))
    start, blocks, inputs = tape.cut(), [], []
    for index in range(config.n_layers):
        inputs.append(x)
        x = _block(tape, config, config.placement.layer(index, config.n_layers), x, fused_attention)
        blocks.append(tape.cut())
    tape.part = "ends"
    _loss(tape, config, _norm(tape, norms.get("final"), x), chunked_loss, z_loss)
    if checkpoint_blocks:
        return _checkpointed(start, blocks, tape.cut(), inputs)
    return _stored([*start, *(op for ops in blocks for op in ops)], tape.cut())


def _norm(tape: Tape, norm: Norm | None, z: Tensor, heads: int = 1) -> Tensor:
    """`alpha * norm(z)`, or z where no norm stands."""
    if norm is None:
        return z
    before, tape.part = tape.part, "norms"
    n = tape.normalise(z, heads if norm.group == "head" else 1)
    y = tape.scale(n, n.width, z.itemsize)
    tape.part = before
    return y


def _block(tape: Tape, config: ModelConfig, norms: dict[Site, Norm], x: Tensor, fused: bool) -> Tensor:
    """`sdd.models.transformer.Block`."""
    tape.part = "projections"
    out = tape.linear(_attention(tape, config, norms, x, fused), config.d_model)
    x = _norm(tape, norms.get("attn_post"), tape.add(_norm(tape, norms.get("attn_out"), out), x))
    tape.part = "feed-forward"
    out = tape.linear(_gated(tape, config, norms, _norm(tape, norms.get("ffn_in"), x)), config.d_model)
    return _norm(tape, norms.get("ffn_post"), tape.add(_norm(tape, norms.get("ffn_out"), out), x))


def _attention(tape: Tape, config: ModelConfig, norms: dict[Site, Norm], x: Tensor, fused: bool) -> Tensor:
    """What the output projection reads."""
    h = _norm(tape, norms.get("attn_in"), x)
    q = tape.rope(_norm(tape, norms.get("q"), tape.linear(h, config.d_model), config.n_heads))
    k = tape.rope(_norm(tape, norms.get("k"), tape.linear(h, config.kv_width), config.n_kv_heads))
    v = _norm(tape, norms.get("v"), tape.linear(h, config.kv_width), config.n_kv_heads)
    tape.part = "attention"
    context = tape.attention(q, k, v, config.n_heads, config.context, fused)
    tape.part = "projections"
    return _norm(tape, norms.get("ctx"), context, config.n_heads)


def _gated(tape: Tape, config: ModelConfig, norms: dict[Site, Norm], h: Tensor) -> Tensor:
    """`silu(gate) * up`, what the down projection reads."""
    gate, up = tape.linear(h, config.d_ff), tape.linear(h, config.d_ff)
    if config.placement.joint_gate_up and {"gate", "up"} <= norms.keys():
        tape.part = "norms"
        n = tape.normalise(tape.record([gate, up], Tensor(2 * config.d_ff, tape.itemsize)))
        gate, up = (tape.scale(n, config.d_ff, tape.itemsize) for _ in range(2))
        tape.part = "feed-forward"
    else:
        gate, up = _norm(tape, norms.get("gate"), gate), _norm(tape, norms.get("up"), up)
    return tape.multiply(tape.silu(gate), up)


def _loss(tape: Tape, config: ModelConfig, x: Tensor, chunked: bool, z_loss: bool) -> None:
    """Head and `sdd.models.transformer.cross_entropy`."""
    if chunked:
        tape.part = "loss"
        # torch's chunks hold half as many logits as x has numbers, or as many; two buffers of them
        tape.record([x], Tensor(0, WIDE), [Tensor(x.width, x.itemsize)], scratch=2 * x.bytes)
        return
    logits = tape.linear(x, config.vocab_size)
    tape.part = "loss"
    logits = tape.cast(logits, WIDE)
    loss = tape.cross_entropy(logits)
    if z_loss:
        tape.logsumexp_squared(logits, loss)


def _stored(body: list[Op], end: list[Op]) -> Activations:
    """Everything is kept until it is used."""
    run = Backward()
    run.forward([*body, *end])
    run.backward(end)
    loss_peak, run.peak = run.peak, 0.0
    run.backward(body)
    return _activations(kept([*body, *end]), loss_peak, run.peak)


def _checkpointed(start: list[Op], blocks: list[list[Op]], end: list[Op], inputs: list[Tensor]) -> Activations:
    """Each block keeps its input and does its forward pass again."""
    run = Backward(inputs)
    run.forward([*start, *end])
    run.backward(end)
    loss_peak, run.peak = run.peak, 0.0
    for ops, x in zip(reversed(blocks), reversed(inputs), strict=True):
        run.forward(ops)
        run.backward(ops)
        run.release([x])
    return _activations(dict.fromkeys(inputs, "stream") | kept([*start, *end]), loss_peak, run.peak)


def _activations(tensors: dict[Tensor, str], loss_peak: float, block_peak: float) -> Activations:
    parts: dict[str, float] = {}
    for tensor, part in tensors.items():
        parts[part] = parts.get(part, 0.0) + tensor.bytes
    loss_kept = parts.pop("loss")
    total = sum(parts.values())
    return Activations(total, loss_kept, loss_peak - total, block_peak - total, parts)
