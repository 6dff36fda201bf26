"""Every other placement against its own equations, written out plainly in float64 (paper, section by section).

A reference reads the model's parameters by name and shares no code with the package.
"""

import random
from collections.abc import Callable

import pytest
import torch
from helpers_models import drawn_tokens, tiny_config, tiny_model
from torch import Tensor
from torch.nn.functional import silu

from sdd.models import LanguageModel, ModelConfig
from sdd.placement import placements

EPS = 1e-3  # large enough for a forgotten eps to show
Weights = dict[str, Tensor]


def norm(z: Tensor, scale: Tensor) -> Tensor:
    return scale * z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()


def head_norm(z: Tensor, scale: Tensor, c: ModelConfig) -> Tensor:
    """A norm on each head; the scale is one of head_dim shared by the heads, or one a feature."""
    return norm(z.unflatten(-1, (-1, c.head_dim)), scale.view(-1, c.head_dim)).flatten(-2)


def rotate(x: Tensor, c: ModelConfig) -> Tensor:
    """RoPE on `[B, T, H, D]` as a product of complex numbers; cosines are kept in float32, as tables are."""
    half = c.head_dim // 2
    frequency = torch.tensor([c.rope_theta ** (-2 * i / c.head_dim) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(
        angle.cos().float().double(), angle.sin().float().double()
    )
    return torch.cat([turned.real, turned.imag], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, c: ModelConfig) -> Tensor:
    """Causal attention, one query head after the other."""
    q, k, v = (z.unflatten(-1, (-1, c.head_dim)) for z in (q, k, v))
    q, k = rotate(q, c), rotate(k, c)
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    heads = []
    for h in range(c.n_heads):
        shared = h // (c.n_heads // c.n_kv_heads)
        scores = q[:, :, h] @ k[:, :, shared].mT / c.head_dim**0.5
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, :, shared])
    return torch.cat(heads, -1)


def layer(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[name].T


def sdd(w: Weights, name: str, x: Tensor) -> Tensor:
    """Equation 4: `alpha * norm(V x)`."""
    return norm(layer(w, name, x), w[f"{name}.alpha"])


def sdd_head(w: Weights, name: str, x: Tensor, c: ModelConfig) -> Tensor:
    return head_norm(layer(w, name, x), w[f"{name}.alpha"], c)


# --- attention and feed-forward networks, from section 2's table and section 6's ---


def plain_attention(x: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    return layer(w, "o", attend(layer(w, "q", x), layer(w, "k", x), layer(w, "v", x), c))


def plain_ffn(x: Tensor, w: Weights) -> Tensor:
    return layer(w, "down", silu(layer(w, "gate", x)) * layer(w, "up", x))


def paper_attention(x: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    return sdd(w, "o", attend(sdd(w, "q", x), sdd(w, "k", x), sdd(w, "v", x), c))


def paper_ffn(x: Tensor, w: Weights) -> Tensor:
    return sdd(w, "down", silu(sdd(w, "gate", x)) * sdd(w, "up", x))


def released_attention(x: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    context = attend(sdd_head(w, "q", x, c), sdd_head(w, "k", x, c), layer(w, "v", x), c)
    return sdd(w, "o", norm(context, w["ctx"]))


def released_ffn(x: Tensor, w: Weights) -> Tensor:
    fused = layer(w, "gate", x), layer(w, "up", x)
    gate, up = norm(torch.cat(fused, -1), torch.cat([w["gate.alpha"], w["up.alpha"]])).chunk(2, -1)
    return sdd(w, "down", silu(gate) * up)


def default_attention(x: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    return sdd(w, "o", attend(sdd_head(w, "q", x, c), sdd_head(w, "k", x, c), layer(w, "v", x), c))


def default_ffn(x: Tensor, w: Weights) -> Tensor:
    return sdd(w, "down", silu(layer(w, "gate", x)) * layer(w, "up", x))


# --- blocks between an embedding and a final norm ---


def peri(x: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    x = x + norm(plain_attention(norm(x, w["attn_in"]), w, c), w["o.alpha"])
    return x + norm(plain_ffn(norm(x, w["ffn_in"]), w), w["down.alpha"])


def hybrid(x: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    q, k, v = (sdd_head(w, name, x, c) for name in ("q", "k", "v"))
    y = norm(x + layer(w, "o", attend(q, k, v, c)), w["attn_post"])
    return y + plain_ffn(y, w)


def qkv_norm(x: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    x = x + layer(w, "o", attend(sdd(w, "q", x), sdd(w, "k", x), sdd(w, "v", x), c))
    return x + plain_ffn(norm(x, w["ffn_in"]), w)


def sdd_prenorm(x: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    x = x + paper_attention(norm(x, w["attn_in"]), w, c)
    return x + paper_ffn(norm(x, w["ffn_in"]), w)


# --- whole models ---


def block_weights(p: Weights, index: int) -> Weights:
    """The weights of one block by short names: q, q.alpha, ctx, ffn_in, ..."""
    prefix = f"blocks.{index}."
    return {
        name.removeprefix(prefix)
        .removeprefix("attn.")
        .removeprefix("ffn.")
        .replace("_proj", "")
        .removesuffix(".weight"): weight
        for name, weight in p.items()
        if name.startswith(prefix)
    }


def decoder(block: Callable[..., Tensor], *, embedding_norm: bool = False) -> Callable[..., Tensor]:
    """`head(norm(block(... block(x))))`."""

    def logits(tokens: Tensor, p: Weights, c: ModelConfig) -> Tensor:
        x = p["embed.weight"][tokens]
        if embedding_norm:
            x = norm(x, p["embed_norm.weight"])
        for i in range(c.n_layers):
            x = block(x, block_weights(p, i), c)
        return norm(x, p["final_norm.weight"]) @ p["head.weight"].T

    return logits


def released_wiring(
    attention: Callable[..., Tensor], ffn: Callable[..., Tensor], residual: Callable[[int], float] = lambda L: 1.0
) -> Callable[..., Tensor]:
    """`x = norm(x); x = x + attn(x); x = norm(x); x = x + ffn(x)`, and a norm before the head: 2L + 1 of them."""

    def logits(tokens: Tensor, p: Weights, c: ModelConfig) -> Tensor:
        scales = [p["embed_norm.weight"]]
        for i in range(c.n_layers):
            scales += [p[f"blocks.{i}.attn_post.weight"], p[f"blocks.{i}.ffn_post.weight"]]
        x = p["embed.weight"][tokens]
        for i in range(c.n_layers):
            w = block_weights(p, i)
            x = norm(x, scales[2 * i])
            x = residual(c.n_layers) * x + attention(x, w, c)
            x = norm(x, scales[2 * i + 1])
            x = residual(c.n_layers) * x + ffn(x, w)
        return norm(x, scales[-1]) @ p["head.weight"].T

    return logits


def lns(tokens: Tensor, p: Weights, c: ModelConfig) -> Tensor:
    """arXiv 2502.05795: both norms of block l times 1/sqrt(l)."""
    x = p["embed.weight"][tokens]
    for i in range(c.n_layers):
        w, factor = block_weights(p, i), 1 / (i + 1) ** 0.5
        x = x + plain_attention(factor * norm(x, w["attn_in"]), w, c)
        x = x + plain_ffn(factor * norm(x, w["ffn_in"]), w)
    return norm(x, p["final_norm.weight"]) @ p["head.weight"].T


def keel(tokens: Tensor, p: Weights, c: ModelConfig) -> Tensor:
    """arXiv 2601.19895: `x = LN(a x + F(LN(x)))` with a = 2L, the first two sublayers excepted."""
    x, a = p["embed.weight"][tokens], 2 * c.n_layers
    for i in range(c.n_layers):
        w = block_weights(p, i)
        y = plain_attention(norm(x, w["attn_in"]), w, c)
        x = x + y if i == 0 else norm(a * x + y, w["attn_post"])
        x = norm((1 if i == 0 else a) * x + plain_ffn(norm(x, w["ffn_in"]), w), w["ffn_post"])
    return x @ p["head.weight"].T


def peri_depth(tokens: Tensor, p: Weights, c: ModelConfig) -> Tensor:
    """`x <- sqrt((k-1)/k) x + f/sqrt(k)` with k from 2: the stream is a running mean of k terms, times sqrt(k)."""
    x, k = norm(p["embed.weight"][tokens], p["embed_norm.weight"]), 2
    for i in range(c.n_layers):
        w = block_weights(p, i)
        for sublayer in (
            lambda h, w=w: norm(plain_attention(norm(h, w["attn_in"]), w, c), w["o.alpha"]),
            lambda h, w=w: norm(plain_ffn(norm(h, w["ffn_in"]), w), w["down.alpha"]),
        ):
            x, k = ((k - 1) / k) ** 0.5 * x + sublayer(x) / k**0.5, k + 1
    return norm(x, p["final_norm.weight"]) @ p["head.weight"].T


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def ngpt(tokens: Tensor, p: Weights, c: ModelConfig) -> Tensor:
    """arXiv 2410.01131 with its authors' bookkeeping: vectors of length 1, s = parameter * value / stored."""
    d, D, repeats = c.d_model, c.head_dim, c.n_heads // c.n_kv_heads
    stored = d**-0.5
    h = unit(p["embed.weight"][tokens])  # as the authors' rule for weights keeps its rows
    future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for i in range(c.n_layers):
        w = block_weights(p, i)
        s_qk = (w["qk_scale"] * (1 / stored)).view(c.n_heads, D)
        q, k, v = (layer(w, name, h).unflatten(-1, (-1, D)) for name in ("q", "k", "v"))
        k, v = (z.repeat_interleave(repeats, 2) for z in (k, v))
        # the authors norm after RoPE, which keeps lengths but for the rounding of its tables
        q, k = s_qk * rotate(unit(q), c), s_qk * rotate(unit(k), c)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * D**0.5
        context = torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -torch.inf).softmax(-1), v).flatten(2)
        h = unit(h + (w["attn_mix.rate"] * (0.05 / stored)).abs() * (unit(layer(w, "o", context)) - h))
        gate, up = (w[f"{name}_scale"] * d**0.5 * layer(w, name, h) for name in ("gate", "up"))
        h = unit(h + (w["ffn_mix.rate"] * (0.05 / stored)).abs() * (unit(layer(w, "down", up * silu(gate))) - h))
    return p["logit_scale.weight"] * (1 / stored) * (h @ p["head.weight"].T)


def equal_shares(tokens: Tensor, p: Weights, c: ModelConfig) -> Tensor:
    """After sublayer k the stream is the norm of k + 1 terms of equal weight, the embedding among them."""
    x, k = norm(p["embed.weight"][tokens], p["embed_norm.weight"]), 1
    for i in range(c.n_layers):
        w = block_weights(p, i)
        for sublayer, post in (
            (lambda h, w=w: default_attention(h, w, c), w["attn_post"]),
            (lambda h, w=w: default_ffn(h, w), w["ffn_post"]),
        ):
            x, k = norm((k**0.5 * x + sublayer(x)) / (k + 1) ** 0.5, post), k + 1
    return x @ p["head.weight"].T


REFERENCES = {
    "lns": lns,
    "keel": keel,
    "peri-depth": peri_depth,
    "ngpt": ngpt,
    "sdd": released_wiring(default_attention, default_ffn),
    "sdd-v1": released_wiring(default_attention, default_ffn),
    "sdd-depth": equal_shares,
    "sdd-paper": released_wiring(paper_attention, paper_ffn),
    "sdd-released": released_wiring(released_attention, released_ffn),
    "sdd-prenorm": decoder(sdd_prenorm),
    "postnorm": released_wiring(plain_attention, plain_ffn),
    "deepnorm": released_wiring(plain_attention, plain_ffn, residual=lambda L: (2 * L) ** 0.25),
    "peri": decoder(peri, embedding_norm=True),
    "hybrid": decoder(hybrid),
    "qkv-norm": decoder(qkv_norm),
}
#: nGPT's authors have no eps.
EPS_OF = {"ngpt": 0.0}
COMPARED_WITH_TRANSFORMERS = {"prenorm", "prenorm-qk", "olmo2"}


def test_every_placement_is_compared_with_something_independent():
    assert REFERENCES.keys() | COMPARED_WITH_TRANSFORMERS == placements.keys()


@pytest.mark.parametrize("name", REFERENCES)
def test_output_and_every_gradient_follow_the_equations(name: str):
    compare(tiny_model(placements[name].replace_eps(EPS_OF.get(name, EPS)), dtype=torch.float64), name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["lns", "keel", "peri-depth", "ngpt"])
def test_rivals_follow_their_equations_in_drawn_shapes_at_init_and_after_steps(name: str, seed: int):
    draw = random.Random(seed)
    n_kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([2, 4, 6])
    n_heads = n_kv_heads * draw.choice([1, 2])
    placement = placements[name].replace_eps(EPS_OF.get(name, EPS))
    shape = {"d_model": n_heads * head_dim, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_ff": draw.randint(1, 30)}
    config = tiny_config(placement, n_layers=draw.randint(1, 4), **shape)
    torch.manual_seed(seed)
    model = LanguageModel(config).double()
    compare(model, name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(2):
        tokens = drawn_tokens(config, seed=step)
        optimizer.zero_grad()
        model(tokens, tokens.roll(-1, 1)).backward()
        optimizer.step()
    compare(model, name)


def compare(model: LanguageModel, name: str) -> None:
    """Logits and every gradient of a model, with the reference of that name."""
    tokens = drawn_tokens(model.config)
    parameters = dict(model.named_parameters())
    logits, expected = model(tokens), REFERENCES[name](tokens, parameters, model.config)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)

    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = [torch.autograd.grad(y, list(parameters.values()), direction) for y in (logits, expected)]
    for parameter, ours, reference in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11, msg=lambda m, n=parameter: f"{n} {m}")
