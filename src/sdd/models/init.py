"""Named init rules: the standard deviation with which each matrix is drawn.

All draws are normal, truncated at three standard deviations. The rules:

    base              1/sqrt(2.5 d_model) everywhere (arXiv 2502.15499)
    base/2            half of it everywhere: under a norm the scale of a matrix says how far a step turns it, not
                      what it puts out
    base-unit-embed   base with a standard normal embedding
    megatron          base, with the output and down projections divided by sqrt(2L) (arXiv 1909.08053)
    normal-0.02       0.02 everywhere (arXiv 2501.00656, OLMo 2)
    deepnorm          Xavier, sqrt(2 / (fan_in + fan_out)), times the gain (8L)^(-1/4) on v, o, up and down
                      (arXiv 2203.00555). Of a GLU's two matrices one takes the gain of the paper's first: here up, the
                      linear branch (the authors' code takes the activated one). Embedding and an untied head
                      1/sqrt(d_model), as in the authors' code.
    1/sqrt(d)         1/sqrt(d_model) everywhere (arXiv 2410.01131)
    1/d               1/d_model everywhere
    unit              1 everywhere: meant for an embedding under a norm, see below

A placement's `draws` give the matrices of the blocks (routers included), the embedding and an untied head a rule or a
factor of their own.

A placement whose weights are "unit" then brings each vector to length 1, see `sdd.models.unit`.
"""

from collections.abc import Iterator

import torch
from torch import nn

from sdd.init_rules import Draw, DrawnPart
from sdd.models.config import ModelConfig
from sdd.models.unit import make_unit
from sdd.nn import ExpertLinear, LearnedScale, RMSNorm, SDDExpertLinear, SDDLinear
from sdd.placement import SCALES

_OUTPUTS = ("o_proj", "down_proj")
_DEEPNORM_GAINED = ("v_proj", "o_proj", "up_proj", "down_proj")


def init_std(config: ModelConfig, role: str, fan_in: int, fan_out: int) -> float:
    """Standard deviation of one matrix before init_scale.

    Args:
        config: gives the rule, d_model and the depth.
        role: "embed", "head", "router" or the projection's name ("q_proj", ..., "down_proj").
        fan_in: number of input features.
        fan_out: number of output features.
    """
    part: DrawnPart = "embed" if role == "embed" else "head" if role == "head" else "blocks"
    draw = config.placement.draws.get(part, Draw())
    return draw.factor * _rule_std(draw.rule or config.placement.init, config, role, fan_in, fan_out)


def _rule_std(rule: str, config: ModelConfig, role: str, fan_in: int, fan_out: int) -> float:
    base = (2.5 * config.d_model) ** -0.5
    match rule:
        case "base":
            return base
        case "base/2":
            return base / 2
        case "base-unit-embed":
            return 1.0 if role == "embed" else base
        case "megatron":
            return base * (SCALES["1/sqrt(2L)"](config.n_layers) if role in _OUTPUTS else 1.0)
        case "normal-0.02":
            return 0.02
        case "1/sqrt(d)":
            return config.d_model**-0.5
        case "1/d":
            return 1 / config.d_model
        case "unit":
            return 1.0
        case "deepnorm":
            if role in ("embed", "head"):
                return config.d_model**-0.5
            gain = SCALES["(8L)^(-1/4)"](config.n_layers) if role in _DEEPNORM_GAINED else 1.0
            return gain * (2 / (fan_in + fan_out)) ** 0.5
        case _:
            raise ValueError(f"init={rule!r} is not an init rule: see sdd.models.init")


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig) -> None:
    """Draw every matrix by the placement's init rule, times init_scale, and set every alpha to its initial value.

    Draws come from torch's default generator, in an order that does not depend on the norms: two placements with one
    init rule start from the same matrices.

    Args:
        model: a `LanguageModel`, whose modules' names are the roles of `init_std`.
        config: its config.
    """
    for role, weight in _matrices(model):
        fan_out, fan_in = weight.shape[-2:]  # of each expert's matrix, where they are stacked
        std = config.init_scale * init_std(config, role, fan_in, fan_out)
        _draw(weight, std)
    for module in model.modules():
        if isinstance(module, (SDDLinear, SDDExpertLinear)):
            nn.init.constant_(module.alpha, module.alpha_init)
        elif isinstance(module, (RMSNorm, LearnedScale)):
            module.reset_parameters()
    if config.placement.weights == "unit":
        make_unit(model)


def _draw(weight: torch.Tensor, std: float) -> None:
    """A matrix of which this process holds a part (a DTensor) is drawn whole, as one process draws it, and cut."""
    if not hasattr(weight, "device_mesh"):
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(weight, DTensor)
    whole = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    _draw(whole, std)
    weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))


def _matrices(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each matrix with its role, in the order of the model: embedding, blocks, head."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Linear, SDDLinear, ExpertLinear)):
            yield name.rsplit(".", 1)[-1], module.weight
