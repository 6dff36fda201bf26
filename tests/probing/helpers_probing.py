"""Tiny models, and every statistic of a probe written out plainly in float64."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdd import functional as sdd_F
from sdd.models import LanguageModel, ModelConfig
from sdd.placement import Norm, placements

ROWS = 16
SEQUENCES = 4


def tiny_model(placement: str, *, seed: int = 0, eps: float = 1e-3, **changes: Any) -> LanguageModel:
    """A model whose alphas and norm weights all differ, with an eps that is not negligible, in float32."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 16,
        "d_ff": 20,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 29,
        "context": 40,
        "rope_theta": 100.0,
        "placement": placements[placement].replace_eps(eps),
    }
    model = LanguageModel(ModelConfig(**shape | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.normal_(std=1.0 if name == "embed.weight" else parameter.shape[1] ** -0.5)
    return model


def drawn_tokens(vocab_size: int = 29, batch: int = 5, length: int = 21, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


class Plain:
    """One forward and backward pass of a model by its equations, keeping every tensor; shares no code with a probe."""

    def __init__(self, model: LanguageModel, tokens: Tensor, *, eos: int | None = None, weight: float = 1.0) -> None:
        self.c = model.config
        self.w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
        self.outputs: dict[str, Tensor] = {}
        self.ratios: dict[str, Tensor] = {}
        self.attention: dict[str, tuple[float, list[float]]] = {}
        self.stream: list[Tensor] = []
        self.eos, self.tokens = eos, tokens
        logits = self.forward(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) * weight
        loss.backward()

    def keep(self, name: str, y: Tensor) -> Tensor:
        y.retain_grad()
        self.outputs[name] = y
        return y

    def normed(self, name: str, z: Tensor, alpha: Tensor | None, norm: Norm) -> Tensor:
        group = self.c.head_dim if norm.group == "head" else z.shape[-1]
        heads = z.unflatten(-1, (-1, group))
        mean_square = heads.square().mean(-1, keepdim=True)
        self.ratios[name] = norm.eps / mean_square
        n = (heads / (mean_square + norm.eps).sqrt()).flatten(-2)
        if norm.depth_factor != "one":
            n = n / (int(name.split(".")[1]) + 1) ** 0.5
        if alpha is None:
            return n
        return n * (alpha.repeat(z.shape[-1] // group) if norm.shared_alpha else alpha)

    def project(self, name: str, x: Tensor, norm: Norm | None) -> Tensor:
        z = x @ self.w[f"{name}.weight"].T
        return self.keep(name, z if norm is None else self.normed(name, z, self.w.get(f"{name}.alpha"), norm))

    def norm(self, name: str, x: Tensor, norm: Norm | None) -> Tensor:
        return x if norm is None else self.keep(name, self.normed(name, x, self.w.get(f"{name}.weight"), norm))

    def forward(self, tokens: Tensor) -> Tensor:
        norms = self.c.placement.norms
        x = self.norm("embed_norm", self.keep("embed", self.w["embed.weight"][tokens]), norms.get("embed"))
        self.stream.append(x)
        for index in range(self.c.n_layers):
            x = self.block(f"blocks.{index}", x, self.c.placement.layer(index, self.c.n_layers))
            self.stream.append(x)
        for x_ in self.stream:
            x_.retain_grad()
        x = self.norm("final_norm", x, norms.get("final"))
        logits = x @ self.w["embed.weight" if self.c.tie_embeddings else "head.weight"].T
        return self.keep("logits", self.scale("logit_scale") * logits)

    def scale(self, name: str, factor: float = 1.0) -> Tensor | float:
        """A learned scale without a norm (nGPT); 1 where there is none."""
        weight = self.w.get(f"{name}.weight")
        return 1.0 if weight is None else self.keep(name, factor * weight)

    def block(self, name: str, x: Tensor, norms: dict) -> Tensor:
        k = 2 * int(name.split(".")[1]) + 1
        f = self.attend(f"{name}.attn", self.norm(f"{name}.attn_in", x, norms.get("attn_in")), norms)
        x = self.norm(f"{name}.attn_post", self.mix(f"{name}.attn_mix", x, f, k), norms.get("attn_post"))
        f = self.feed(f"{name}.ffn", self.norm(f"{name}.ffn_in", x, norms.get("ffn_in")), norms)
        return self.norm(f"{name}.ffn_post", self.mix(f"{name}.ffn_mix", x, f, k + 1), norms.get("ffn_post"))

    def mix(self, name: str, x: Tensor, f: Tensor, k: int) -> Tensor:
        L = self.c.n_layers
        match self.c.placement.name:
            case "deepnorm":
                return (2 * L) ** 0.25 * x + f
            case "keel" if k > 2:
                return 2 * L * x + f
            case "peri-depth" | "sdd-depth":
                return (k / (k + 1)) ** 0.5 * x + f / (k + 1) ** 0.5
            case "ngpt":
                a = abs(self.scale(f"{name}.rate", 0.05 * self.c.d_model**0.5))
                return (1 - a) * x + a * f
            case _:
                return x + f

    def attend(self, name: str, x: Tensor, norms: dict) -> Tensor:
        T, D = x.shape[1], self.c.head_dim
        q, k, v = (
            self.project(f"{name}.{site}_proj", x, norms.get(site)).unflatten(-1, (-1, D)).transpose(1, 2)
            for site in "qkv"
        )
        cos, sin = sdd_F.rope_tables(T, D, self.c.rope_theta)
        q, k = (sdd_F.apply_rope(t, cos.double(), sin.double()) for t in (q, k))
        k, v = (t.repeat_interleave(self.c.n_heads // self.c.n_kv_heads, 1) for t in (k, v))
        s = self.scale(f"{name}.qk_scale", self.c.d_model**0.5)
        if isinstance(s, Tensor):
            q, k = (s.view(self.c.n_heads, 1, D) * t for t in (q, k))
        logits = (q @ k.mT / math.sqrt(D)).masked_fill(~self.allowed(T), -math.inf)
        weights = logits.softmax(-1)
        self.attention[name] = plain_attention(logits, weights)
        context = (weights @ v).transpose(1, 2).flatten(2)
        return self.project(
            f"{name}.o_proj", self.norm(f"{name}.ctx", context, norms.get("ctx")), norms.get("attn_out")
        )

    def allowed(self, T: int) -> Tensor:
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        if self.eos is None:
            return causal
        same = torch.ones(len(self.tokens), 1, T, T, dtype=torch.bool)
        for b, row in enumerate(self.tokens.tolist()):
            for i, j in itertools.product(range(T), range(T)):
                same[b, 0, i, j] = self.eos not in row[j:i]
        return same & causal

    def feed(self, name: str, x: Tensor, norms: dict) -> Tensor:
        gate, up = f"{name}.gate_proj", f"{name}.up_proj"
        if self.c.placement.joint_gate_up:
            z = torch.cat([x @ self.w[f"{gate}.weight"].T, x @ self.w[f"{up}.weight"].T], -1)
            alpha = torch.cat([self.w[f"{gate}.alpha"], self.w[f"{up}.alpha"]])
            y_gate, y_up = self.normed(gate, z, alpha, norms["gate"]).chunk(2, -1)
            self.ratios[up] = self.ratios[gate]
            y_gate, y_up = self.keep(gate, y_gate), self.keep(up, y_up)
        else:
            y_gate, y_up = self.project(gate, x, norms.get("gate")), self.project(up, x, norms.get("up"))
        y_gate, y_up = self.scale(f"{name}.gate_scale") * y_gate, self.scale(f"{name}.up_scale") * y_up
        return self.project(f"{name}.down_proj", F.silu(y_gate) * y_up, norms.get("ffn_out"))


def plain_attention(logits: Tensor, weights: Tensor) -> tuple[float, list[float]]:
    """Largest logit, and the entropies of the sampled rows of attention weights."""
    T = logits.shape[-2]
    rows = sorted({T * i // min(ROWS, T) - 1 for i in range(1, min(ROWS, T) + 1)})
    sample = weights[:SEQUENCES, :, rows]
    entropies = [
        -sum(p * math.log(p) for p in row.tolist() if p > 0) for row in sample.flatten(0, -2) if not row.isnan().any()
    ]
    return logits[:SEQUENCES, :, rows].max().item(), entropies


def rms(*tensors: Tensor) -> float:
    together = torch.cat([tensor.double().flatten() for tensor in tensors])
    return together.square().mean().sqrt().item()


def expected_sites(parts: list[Plain]) -> dict[str, dict[str, float]]:
    """The statistics of activations and gradients that a probe must find in a step of these microbatches."""
    found: dict[str, dict[str, float]] = {}
    for name in parts[0].outputs:
        found[name] = {
            "rms": rms(*(part.outputs[name] for part in parts)),
            "grad_rms": rms(*(part.outputs[name].grad for part in parts)),
        }
    for name in parts[0].ratios:
        ratios = torch.cat([part.ratios[name].flatten() for part in parts])
        found[name] |= {"eps_ratio": ratios.mean().item(), "eps_ratio_max": ratios.max().item()}
    for name in parts[0].attention:
        entropies = [entropy for part in parts for entropy in part.attention[name][1]]
        found[name] = {
            "logit_max": max(part.attention[name][0] for part in parts),
            "entropy": sum(entropies) / len(entropies),
        }
    return found


def expected_layers(parts: list[Plain]) -> dict[str, list[float]]:
    """The same for the residual stream."""
    streams = list(zip(*(part.stream for part in parts), strict=True))
    return {
        "rms": [rms(*xs) for xs in streams],
        "grad_rms": [rms(*(x.grad for x in xs)) for xs in streams],
        "cosine": [
            torch.cat([F.cosine_similarity(x, y, dim=-1).flatten() for x, y in zip(*pair, strict=True)]).mean().item()
            for pair in itertools.pairwise(streams)
        ],
    }


def expected_weights(
    before: dict[str, Tensor], after: dict[str, Tensor], gradients: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """The statistics of the parameters, by site."""
    found: dict[str, dict[str, float]] = {}
    for name, old in before.items():
        site, _, leaf = name.rpartition(".")
        role = "weight" if old.ndim > 1 else "alpha"
        assert leaf == "weight" or role == "alpha"
        old, new = old.double().flatten(), after[name].double().flatten()
        stats = {f"{role}_norm": old.norm().item(), f"{role}_grad_rms": rms(gradients[name])}
        if role == "weight":
            cosine = (old @ new / (old.norm() * new.norm())).clamp(-1, 1)
            stats |= {"update_ratio": ((new - old).norm() / old.norm()).item(), "angle": cosine.acos().item()}
        found.setdefault(site, {}).update(stats)
    return found


def merged(*dicts: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for each in dicts:
        for site, stats in each.items():
            found.setdefault(site, {}).update(stats)
    return found


def assert_close(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]], rel: float = 2e-4) -> None:
    """The same sites with the same statistics, and equal numbers."""
    assert found.keys() == expected.keys()
    for site, stats in expected.items():
        assert found[site].keys() == stats.keys(), site
        for stat, value in stats.items():
            tolerance = max(rel * abs(value), 1e-7)
            assert abs(found[site][stat] - value) <= tolerance, f"{site} {stat}: {found[site][stat]}, expected {value}"


def parameters_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
