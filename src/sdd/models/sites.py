"""The modules that stand at the sites of a placement."""

import torch
from torch import Tensor, nn

from sdd.models.config import ModelConfig
from sdd.nn import ExpertLinear, LearnedScale, RMSNorm, SDDExpertLinear, SDDLinear
from sdd.placement import DEPTH_FACTORS, WIDTHS, Norm, ScaleSite


def projection_at(
    in_features: int, out_features: int, norm: Norm | None, config: ModelConfig, device: torch.device | str | None
) -> nn.Linear | SDDLinear:
    """A plain Linear, or an SDDLinear if its site has a norm."""
    if norm is None:
        return nn.Linear(in_features, out_features, bias=False, device=device)
    return SDDLinear(
        in_features,
        out_features,
        bias=False,
        device=device,
        group=_group(norm, config),
        shared_alpha=norm.shared_alpha,
        alpha_init=norm.alpha(config.n_layers),
        eps=norm.eps,
        scale=norm.scale,
    )


def norm_at(norm: Norm | None, config: ModelConfig, device: torch.device | str | None, layer: int = 1) -> nn.Module:
    """The RMSNorm of a site that is no projection; the identity, which costs nothing, if it has no norm.

    Args:
        norm: of the site.
        config: gives the widths and the depth.
        device: as in every module.
        layer: the block's number l, from 1, for a factor by depth.
    """
    if norm is None:
        return nn.Identity()
    return RMSNorm(
        config.head_dim if norm.shared_alpha else config.d_model,
        norm.alpha(config.n_layers),
        norm.eps,
        device,
        group=_group(norm, config),
        scale=norm.scale,
        factor=DEPTH_FACTORS[norm.depth_factor](layer),
    )


def _group(norm: Norm, config: ModelConfig) -> int | None:
    return config.head_dim if norm.group == "head" else None


def experts_at(
    in_features: int, out_features: int, norm: Norm | None, config: ModelConfig, device: torch.device | str | None
) -> ExpertLinear:
    """The layers of all experts at one site: plain ones, or SDD layers if the site has a norm."""
    assert config.moe is not None
    shape = (config.moe.n_experts, in_features, out_features, device)
    if norm is None:
        return ExpertLinear(*shape)
    return SDDExpertLinear(*shape, alpha_init=norm.alpha(config.n_layers), eps=norm.eps)


def scale_at(
    site: ScaleSite, width: int, config: ModelConfig, device: torch.device | str | None
) -> LearnedScale | None:
    """The learned scale of a site; None if the placement has none there."""
    scale = config.placement.scales.get(site)
    if scale is None:
        return None
    return LearnedScale(width, scale.value(config.d_model), WIDTHS[scale.stored](config.d_model), device)


def scaled_by(x: Tensor, scale: LearnedScale | None) -> Tensor:
    """`s * x` along the last dimension; x itself without a scale."""
    return x if scale is None else (scale() * x).to(x.dtype)
