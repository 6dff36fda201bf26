"""Norms that can be left out because every reader of theirs cancels them.

An SDD projection does not see the scale of what it reads: for a number c > 0 a token, `norm(V (c h)) = norm(V h)` at
eps = 0. So where all readers of a norm are SDD, its 1/rms cancels and only its alpha is left:

    up       before an SDD down projection     h = silu(gate) * up is linear in up
    ctx      before an SDD output projection
    attn_in  if q, k and v are SDD
    ffn_in   if gate and up are SDD and no router reads it

What breaks it, and keeps the norm: several groups a token (per-head norms, or a joint gate|up group, whose statistic
the gate needs), a bias or another term beside the reader's V, a reader that is no SDD, and float16, whose range the
unnormed values leave (the smallest 1/rms reaches 2e4 against the factor of a gradient scaler).

With eps in the roots it stays exact if the reader's eps is taken on the scale of what it reads: with z the producer's
values, `h = z / s`, `s^2 = mean(z^2) + eps`, the reader gets z in place of h and `eps' = eps * s^2` in place of eps,

    V z / sqrt(mean((V z)^2) + eps * s^2) = V h / sqrt(mean((V h)^2) + eps),

gradients included, since s^2 is differentiated. A mere floor under the root would be cheaper by one number a token but
only agrees to eps / mean((V h)^2), which small init scales make large. The statistic is free where a kernel reads the
producer anyway. `sdd.models.lean` computes it: `Read` holds s^2, and `product` gives the reader its eps'.

Source: the observation is this project's own; see docs/design.md.
"""

from sdd.models.config import ModelConfig
from sdd.placement import Site


def left_out_norms(config: ModelConfig, index: int) -> frozenset[Site]:
    """The sites of block `index` whose norms are left out; the conditions stand at the head of this module."""
    if not config.eliminate_norms:
        return frozenset()
    placement = config.placement
    norms = placement.layer(index, config.n_layers)
    if any(not norm.scale for norm in norms.values()):
        return frozenset()  # the lean block does not know these norms
    found: set[Site] = set()
    if norms.keys() >= {"up", "ffn_out"} and not placement.joins_gate_up(norms):
        found.add("up")
    if norms.keys() >= {"ctx", "attn_out"} and norms["ctx"].group == "full":
        found.add("ctx")
    if norms.keys() >= {"attn_in", "q", "k", "v"}:
        found.add("attn_in")
    if norms.keys() >= {"ffn_in", "gate", "up"} and config.moe is None:  # a router would read it too
        found.add("ffn_in")
    return frozenset(found)
