"""The converter: a placement on the config tree of torchtitan's Llama 3, before the model is built."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import Identity
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.model import ModelConfigConverter

from sdd.interop.torchtitan.modules import JointFeedForward, Norm, SDDBlock, SDDLinear, SDDModel, SDDQKVLinear
from sdd.interop.torchtitan.shape import check_is_plain, model_config
from sdd.models import ModelConfig
from sdd.models.init import init_std
from sdd.placement import DEPTH_FACTORS, PROJECTIONS, RESIDUALS, Placement, Site, placements
from sdd.placement import Norm as NormAt


class SDDConverter(ModelConfigConverter):
    """Put the norms of a placement into Llama 3, draw its matrices by the placement's rule.

    The three projections of the attention become modules of their own (`fuse_qkv=False`), because each may have a norm.
    Norms that Llama 3 has and the placement has not are left out. Attention and the shape stay.

    Raises:
        UserError: on `convert`, if torchtitan's model or the placement has something that this does not know.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        """What to convert to.

        Attributes:
            placement: one of `sdd.placements`, its name, or your own.
            rope_scaling: "none" for the frequencies that this package computes, "llama" for those of Llama 3.1.
        """

        placement: Placement | str = field(default_factory=lambda: placements["sdd"])
        rope_scaling: Literal["none", "llama"] = "none"

    def __init__(self, config: Config) -> None:
        self.placement, self.rope_scaling = config.placement, config.rope_scaling

    def convert(self, model_config: Any) -> SDDModel.Config:
        """A new config; the given one stays as it is.

        Args:
            model_config: a `Llama3Model.Config` that no other converter has changed.
        """
        return _converted(model_config, self.placement, self.rope_scaling)


def _converted(config: Any, placement: Placement | str, rope_scaling: str) -> SDDModel.Config:
    shape = model_config(config, placement)
    check_is_plain(config)
    final = shape.placement.norms.get("final")
    parts = _Parts(shape, rope_scaling)
    embedding = {"weight": skip_param_init} if shape.tie_embeddings else parts.init("embed", 1, 1)
    head = parts.init("embed" if shape.tie_embeddings else "head", 1, 1)
    return SDDModel.Config(
        **_fields(config)
        | {
            "tok_embeddings": dataclasses.replace(config.tok_embeddings, param_init=embedding),
            "norm": Identity.Config() if final is None else _norm(final, shape, shape.d_model, name="weight"),
            "lm_head": dataclasses.replace(config.lm_head, param_init=head),
            "layers": [parts.block(layer, index) for index, layer in enumerate(config.layers)],
            "placement": shape.placement,
        }
    )


def _fields(config: Any) -> dict[str, Any]:
    """What a config of torchtitan was made of."""
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config) if item.init}


class _Parts:
    """Makes the parts of blocks.

    Args:
        shape: the model.
        rope_scaling: see `SDDConverter.Config`.
    """

    def __init__(self, shape: ModelConfig, rope_scaling: str) -> None:
        self.shape, self.rope_scaling = shape, rope_scaling

    def block(self, layer: Any, index: int) -> SDDBlock.Config:
        """One block."""
        shape, norms = self.shape, self.shape.placement.layer(index, self.shape.n_layers)
        rule = RESIDUALS[shape.placement.residual]
        C, F = shape.d_model, shape.d_ff
        names: dict[str, Site] = {
            "attention_norm": "attn_in",
            "attention_post_norm": "attn_post",
            "ffn_norm": "ffn_in",
            "ffn_post_norm": "ffn_post",
        }
        found: dict[str, Any] = {name: norms.get(site) for name, site in names.items()}
        found["embed_norm"] = shape.placement.norms.get("embed") if index == 0 else None
        stream = {name: norm and _norm(norm, shape, C, name="weight", layer=index + 1) for name, norm in found.items()}
        attention, network = layer.attention, layer.feed_forward
        kind = JointFeedForward.Config if shape.placement.joins_gate_up(norms) else type(network)
        qkv = SDDQKVLinear.Config(
            head_dim=shape.head_dim,
            wq=self.projection("q", norms, C, C),
            wkv=self.projection("k", norms, C, shape.kv_width),
            wv=self.projection("v", norms, C, shape.kv_width),
        )
        ctx = norms.get("ctx")
        before = ctx and _norm(ctx, shape, C, name="weight", layer=index + 1)
        wo = self.projection("attn_out", norms, C, C, before=before)
        return SDDBlock.Config(
            attention=dataclasses.replace(
                attention, qkv_linear=qkv, wo=wo, rope=dataclasses.replace(attention.rope, scaling=self.rope_scaling)
            ),
            feed_forward=kind(
                **_fields(network)
                | {
                    "w1": self.projection("gate", norms, C, F),
                    "w2": self.projection("ffn_out", norms, F, C),
                    "w3": self.projection("up", norms, C, F),
                }
            ),
            residual=(rule(2 * index + 1, shape.n_layers), rule(2 * index + 2, shape.n_layers)),
            **stream,
        )

    def projection(
        self,
        site: Site,
        norms: dict[Site, NormAt],
        fan_in: int,
        fan_out: int,
        before: Norm.Config | None = None,
    ) -> Linear.Config | SDDLinear.Config:
        """A plain Linear, or one with its norms."""
        linear = Linear.Config(
            in_features=fan_in, out_features=fan_out, param_init=self.init(_ROLES[site], fan_in, fan_out)
        )
        norm = norms.get(site)
        if norm is None and before is None:
            return linear
        after = None if norm is None else _norm(norm, self.shape, fan_out, name="alpha")
        return SDDLinear.Config(before=before, linear=linear, norm=after)

    def init(self, role: str, fan_in: int, fan_out: int) -> dict[str, Any]:
        """How one matrix is drawn, as `sdd.models.init` draws it."""
        std = init_std(self.shape, role, fan_in, fan_out)
        return {"weight": partial(nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)}


_ROLES: dict[Site, str] = dict(
    zip(PROJECTIONS, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), strict=True)
)


def _norm(norm: NormAt, shape: ModelConfig, width: int, *, name: str, layer: int = 1) -> Norm.Config:
    return Norm.Config(
        width=shape.head_dim if norm.shared_alpha else width,
        scale_name=name if norm.scale else None,
        initial=norm.alpha(shape.n_layers),
        eps=norm.eps,
        group=shape.head_dim if norm.group == "head" else None,
        factor=DEPTH_FACTORS[norm.depth_factor](layer),
    )
