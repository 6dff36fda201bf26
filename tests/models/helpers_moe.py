"""Mixtures of experts small enough to test, and what they should compute, token by token."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from helpers_models import tiny_config
from torch import Tensor

from sdd.models import LanguageModel, ModelConfig, MoEConfig
from sdd.models.moe import MoE
from sdd.nn import ExpertLinear, SDDExpertLinear
from sdd.placement import Placement


def moe_config(placement: str | Placement, moe: MoEConfig, **changes: Any) -> ModelConfig:
    """Widths that no kernel takes whole (18 float32 numbers are no multiple of 16 bytes) unless changed."""
    return tiny_config(placement, **{"d_ff": 18, "moe": moe} | changes)


@torch.no_grad()
def drawn(model: LanguageModel) -> LanguageModel:
    """Alphas and norm weights in [0.5, 1.5]; matrices so that outputs are about 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith(".alpha"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=1.0 if name == "embed.weight" else parameter.shape[-1] ** -0.5)
    return model


def drawn_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(seed)
    return drawn(LanguageModel(config)).to(dtype)


def drawn_layer(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> MoE:
    layer = drawn_model(replace(config, n_layers=1), seed, dtype).blocks[0].ffn
    assert isinstance(layer, MoE)
    return layer


def rms(z: Tensor, eps: float) -> Tensor:
    return z / (z.square().mean() + eps).sqrt()


def naive(layer: MoE, x_NC: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs `[N, C]`, load balancing loss and router z-loss by the equations: a loop over tokens and experts."""
    assert config.moe is not None
    E, k = config.moe.n_experts, config.moe.top_k
    outputs, chosen, probabilities, z_losses = [], torch.zeros(E), [], []
    for x in x_NC:
        logits = layer.router.weight @ x
        p = logits.exp() / logits.exp().sum()
        probabilities.append(p)
        z_losses.append(logits.exp().sum().log() ** 2)
        best = sorted(range(E), key=lambda e: -p[e].item())[:k]
        scale = sum(p[e] for e in best) if config.moe.renormalise else 1.0
        y = torch.zeros_like(x)
        for e in best:
            chosen[e] += 1
            y = y + p[e] / scale * expert(layer, e, x)
        if layer.shared is not None:
            y = y + layer.shared(x)
        outputs.append(y)
    share, mean = chosen / (len(x_NC) * k), torch.stack(probabilities).mean(0)
    return torch.stack(outputs), E * (share * mean).sum(), torch.stack(z_losses).mean()


def expert(layer: MoE, e: int, x: Tensor) -> Tensor:
    """One expert on one token."""
    gate, up = layer.gate_proj, layer.up_proj
    if not layer.joint:
        return of_expert(layer.down_proj, e, F.silu(of_expert(gate, e, x)) * of_expert(up, e, x))
    assert isinstance(gate, SDDExpertLinear)
    assert isinstance(up, SDDExpertLinear)
    z_gate, z_up = gate.weight[e] @ x, up.weight[e] @ x
    n = rms(torch.cat([z_gate, z_up]), gate.eps)
    h = F.silu(gate.alpha[e] * n[: len(z_gate)]) * (up.alpha[e] * n[len(z_gate) :])
    return of_expert(layer.down_proj, e, h)


def of_expert(projection: ExpertLinear, e: int, x: Tensor) -> Tensor:
    z = projection.weight[e] @ x
    return projection.alpha[e] * rms(z, projection.eps) if isinstance(projection, SDDExpertLinear) else z
