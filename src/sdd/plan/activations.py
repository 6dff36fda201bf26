"""What training keeps for the backward pass, counted from the placement's equations.

The model is written down once more as its operations, each with the tensors that its derivative needs. With fused
kernels (`sdd.kernels`, what a GPU runs):

    operation                        keeps
    y = W x                          x
    alpha * norm(z), with RoPE too   z and r = 1/rms, one float32 a group; if z is float32 and the result is
                                     bfloat16, norm(z) in bfloat16 in place of z
    silu(gate) * up, normed or not   z of both and r
    residual + alpha * norm(z)       z and r
      with a post-norm               z, the residual as its readers keep it, and both r
      with the next branch's norm    what that norm keeps too
    fused attention                  q, k, v, the output, and one logsumexp a head; where not fused, T weights a head
    cross-entropy                    log softmax(logits) (float32)

Without them (`sdd.functional` under autograd) a norm keeps z, r and n in float32, and SwiGLU its intermediate. A tensor
that several operations keep is kept once. Under bfloat16 autocast matrix products and attention are bfloat16, norms and
the residual stream float32. Norms that are left out (`sdd.models.elimination`) keep what their statistic is taken of.
All sizes are bytes a token.
"""

from dataclasses import dataclass, replace

from sdd.models import ModelConfig
from sdd.models.block import eliminations
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
    kernels: bool = True,
) -> Activations:
    """Count the activations of `LanguageModel` on sequences of `config.context` tokens.

    Args:
        config: the model.
        bfloat16: under autocast; else float32.
        checkpoint_blocks: each block keeps only its input, and is recomputed.
        chunked_loss: the loss keeps the gradient of its input, not the logits.
        z_loss: the loss has that term.
        fused_attention: by a kernel that never writes the T x T weights.
        kernels: norms run as fused kernels, else composed of torch's operations.
    """
    tape = Tape(2 if bfloat16 else WIDE, "ends", kernels)
    norms = config.placement.norms
    tokens = Tensor(1, 8)  # int64, kept by the embedding
    x = _norm(tape, norms.get("embed"), tape.record([], Tensor(config.d_model, WIDE), [tokens]))
    start, blocks, inputs = tape.cut(), [], []
    for index in range(config.n_layers):
        inputs.append(x)
        x = _block(tape, config, index, x, fused_attention)
        blocks.append(tape.cut())
    tape.part = "ends"
    _loss(tape, config, _norm(tape, norms.get("final"), x), chunked_loss, z_loss)
    if checkpoint_blocks:
        return _checkpointed(start, blocks, tape.cut(), inputs)
    return _stored([*start, *(op for ops in blocks for op in ops)], tape.cut())


def _norm(tape: Tape, norm: Norm | None, z: Tensor, heads: int = 1, itemsize: int | None = None) -> Tensor:
    """`alpha * norm(z)`, or z where no norm stands."""
    if norm is None:
        return z
    before, tape.part = tape.part, "norms"
    y = tape.norm(z, heads if norm.group == "head" else 1, itemsize or z.itemsize)
    tape.part = before
    return y


def _block(tape: Tape, config: ModelConfig, index: int, x: Tensor, fused_attention: bool) -> Tensor:
    """`sdd.models.block.Block`."""
    norms, left_out = config.placement.layer(index, config.n_layers), eliminations(config, index)
    tape.part = "projections"
    h = _enter(tape, "attn_in", norms, left_out, x)
    context = _attention(tape, config, norms, h, fused_attention)
    context = tape.skip(context) if "ctx" in left_out else _norm(tape, norms.get("ctx"), context, config.n_heads)
    kept = x if "attn_in" in norms else h
    x = _leave(tape, norms.get("attn_out"), norms.get("attn_post"), tape.linear(context, config.d_model), x, kept)
    tape.part = "feed-forward"
    h = _enter(tape, "ffn_in", norms, left_out, x)
    kept = x if "ffn_in" in norms else h
    if config.moe is not None:
        return _leave(tape, None, norms.get("ffn_post"), _mixture(tape, config, norms, left_out, h), x, kept)
    h = _gated(tape, config, norms, left_out, h)
    return _leave(tape, norms.get("ffn_out"), norms.get("ffn_post"), tape.linear(h, config.d_model), x, kept)


def _enter(tape: Tape, site: Site, norms: dict[Site, Norm], left_out: frozenset[Site], x: Tensor) -> Tensor:
    """What the projections read, in their precision."""
    if site in left_out:
        return tape.cast(tape.skip(x), tape.itemsize)
    itemsize = tape.itemsize if tape.kernels else None
    return tape.cast(_norm(tape, norms.get(site), x, itemsize=itemsize), tape.itemsize)


def _leave(tape: Tape, norm: Norm | None, post: Norm | None, z: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """`post(x + alpha * norm(z))`; `kept` stands for x in the backward pass."""
    if not tape.kernels:
        return _norm(tape, post, tape.add(_norm(tape, norm, z), x))
    before, tape.part = tape.part, "norms"
    y = tape.residual_norm(z, x, kept, norm is not None, post is not None)
    tape.part = before
    return y


def _attention(tape: Tape, config: ModelConfig, norms: dict[Site, Norm], h: Tensor, fused: bool) -> Tensor:
    """`softmax(q k^T) v`."""
    q = _rotated(tape, norms.get("q"), tape.linear(h, config.d_model), config.n_heads)
    k = _rotated(tape, norms.get("k"), tape.linear(h, config.kv_width), config.n_kv_heads)
    v = _norm(tape, norms.get("v"), tape.linear(h, config.kv_width), config.n_kv_heads)
    tape.part = "attention"
    context = tape.attention(q, k, v, config.n_heads, config.context, fused)
    tape.part = "projections"
    return context


def _rotated(tape: Tape, norm: Norm | None, z: Tensor, heads: int) -> Tensor:
    y = _norm(tape, norm, z, heads)
    return y if tape.kernels and norm is not None else tape.rope(y)


def _gated(tape: Tape, config: ModelConfig, norms: dict[Site, Norm], left_out: frozenset[Site], h: Tensor) -> Tensor:
    """`silu(gate) * up`, what the down projection reads."""
    gate, up = tape.linear(h, config.d_ff), tape.linear(h, config.d_ff)
    normed = sum(site in norms for site in ("gate", "up"))
    # a skipped Pre-Norm gives each row its own eps, which the kernel does not take
    if tape.kernels and "ffn_in" not in left_out:
        tape.part = "norms" if normed else tape.part
        h = tape.record([gate, up], Tensor(config.d_ff, tape.itemsize), [gate, up, Tensor(normed, WIDE)])
        tape.part = "feed-forward"
        return h
    if config.placement.joint_gate_up and normed == 2:
        tape.part = "norms"
        n = tape.normalise(tape.record([gate, up], Tensor(2 * config.d_ff, tape.itemsize)))
        gate, up = (tape.scale(n, config.d_ff, tape.itemsize) for _ in range(2))
        tape.part = "feed-forward"
    else:
        gate = _norm(tape, norms.get("gate"), gate)
        up = (
            tape.scale(tape.skip(up), config.d_ff, tape.itemsize)
            if "up" in left_out
            else _norm(tape, norms.get("up"), up)
        )
    return tape.multiply(tape.silu(gate), up)


def _mixture(tape: Tape, config: ModelConfig, norms: dict[Site, Norm], left_out: frozenset[Site], h: Tensor) -> Tensor:
    """`sdd.models.moe.MoE`: k rows a token."""
    assert config.moe is not None
    E, k, C, F = config.moe.n_experts, config.moe.top_k, config.d_model, config.d_ff
    logits = tape.cast(tape.linear(h, E), WIDE)
    p, log_p, log_sum = Tensor(E, WIDE), Tensor(E, WIDE), Tensor(1, WIDE)
    pairs, tokens = Tensor(k, 8), Tensor(k, 8)
    tape.record([logits], log_p, [log_p])
    tape.record([log_p], p, [p])
    tape.record([logits, log_p], log_sum, [log_sum])
    weights = tape.record([p], Tensor(k, WIDE), [Tensor(k, 8)])  # indices of the chosen
    if config.moe.renormalise:
        weights = tape.record([weights], Tensor(k, WIDE), [weights, Tensor(1, WIDE)])
    experts = Tensor(k, 8)
    rows = tape.record([h], Tensor(k * C, h.itemsize), [pairs, tokens])
    gate, up = tape.linear(rows, k * F), tape.linear(rows, k * F)
    if config.placement.joint_gate_up and {"gate", "up"} <= norms.keys():
        z = tape.record([gate, up], Tensor(2 * k * F, tape.itemsize))
        y = _expert_norm(tape, norms.get("gate"), z, k, experts)
        gate, up = (tape.record([y], Tensor(k * F, tape.itemsize)) for _ in range(2))
    else:
        gate = _expert_norm(tape, norms.get("gate"), gate, k, experts)
        up = _expert_up(tape, norms, left_out, up, k, experts)
    if tape.kernels:
        h_rows = tape.record([gate, up], Tensor(k * F, tape.itemsize), [gate, up])
    else:
        h_rows = tape.multiply(tape.silu(gate), up)
    y = _expert_norm(tape, norms.get("ffn_out"), tape.linear(h_rows, k * C), k, experts)
    weights = tape.record([weights], Tensor(k, WIDE), [pairs])
    weighted = tape.record([y, weights], Tensor(k * C, WIDE), [y, weights])
    y = tape.cast(tape.record([weighted], Tensor(C, WIDE), [tokens]), tape.itemsize)
    if not config.moe.d_shared:
        return y
    shared = _gated(tape, replace(config, d_ff=config.moe.d_shared), norms, left_out, h)
    return tape.add(_norm(tape, norms.get("ffn_out"), tape.linear(shared, C)), y)


def _expert_norm(tape: Tape, norm: Norm | None, z: Tensor, k: int, experts: Tensor) -> Tensor:
    """`alpha_e * norm(z)` in one function."""
    if norm is None:
        return z
    before, tape.part = tape.part, "norms"
    y = tape.record([z], Tensor(z.width, z.itemsize), [z, Tensor(k, WIDE), experts], scratch=4 * z.width * WIDE)
    tape.part = before
    return y


def _expert_up(
    tape: Tape, norms: dict[Site, Norm], left_out: frozenset[Site], z: Tensor, k: int, experts: Tensor
) -> Tensor:
    if "up" not in left_out:
        return _expert_norm(tape, norms.get("up"), z, k, experts)
    wide = tape.cast(z, WIDE)
    tape.record([wide], Tensor(k, WIDE), [wide, Tensor(k, WIDE)], scratch=wide.bytes)
    alphas = Tensor(z.width, WIDE)
    return tape.cast(tape.record([wide], Tensor(z.width, WIDE), [wide, alphas, experts]), z.itemsize)


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
