"""The modules of a converted Llama 3, each with the config that torchtitan builds it from.

Matrices stay torchtitan's own `Linear`, so that its sharding, LoRA and quantisation know them. A norm stands beside its
matrix as a module, `wo.linear.weight` and `wo.norm.alpha`.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torchtitan.models.common.attention import BaseQKVLinear, QKVLinear
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.protocols.module import Module

from sdd.errors import UserError
from sdd.functional import norm, statistics_dtype
from sdd.interop.torchtitan.sharding import BLOCK_NORMS, set_sharding
from sdd.kernels import scaled_norm
from sdd.parallel.exchange import combined
from sdd.parallel.norms import sharded_scaled_norm
from sdd.parameters import keep_wide
from sdd.placement import Placement, placements


class Norm(Module):
    """`factor * scale * z / sqrt(mean(z^2) + eps)`, the scale named alpha in an SDD layer and weight elsewhere.

    The scale is float32 whatever the model's dtype, and applied before the cast back. It takes plain tensors and
    DTensors; a norm over features that are cut costs one all-reduce of one number a token each way.

    Attributes:
        scale_name: the parameter's name.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Width of the scale, and what `sdd.placement.Norm` says of the site.

        Attributes:
            width: of the scale: the features, or a head if all heads share one.
            scale_name: "alpha" or "weight"; None for a norm without a scale.
            initial: the scale at first.
            eps: added to the mean square.
            group: width of the groups (heads); None for one group.
            factor: a number that is not learned.
        """

        width: int
        scale_name: str | None
        initial: float = 1.0
        eps: float = 1e-6
        group: int | None = None
        factor: float = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.scale_name, self.initial = config.scale_name, config.initial
        self.eps, self.group, self.factor = config.eps, config.group, config.factor
        if config.scale_name is not None:
            self.register_parameter(config.scale_name, nn.Parameter(torch.empty(config.width, dtype=torch.float32)))
            self.reset_parameters()

    @property
    def scale(self) -> nn.Parameter | None:
        """The parameter, if there is one."""
        return None if self.scale_name is None else self.get_parameter(self.scale_name)

    def reset_parameters(self) -> None:
        """Set the scale to its initial value."""
        if self.scale is not None:
            nn.init.constant_(self.scale, self.initial)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        names = () if self.scale_name is None else (self.scale_name,)
        return keep_wide(self, names, lambda: super(Norm, self)._apply(fn, recurse))

    def forward(self, input: Tensor, *, beside: Tensor | None = None) -> Tensor:
        """`[..., features]` to `[..., features]`.

        Args:
            input: what is normed.
            beside: as many features whose squares count too, of a norm over both.
        """
        scale = self.scale
        if self.scale_name == "alpha" and scale is not None and scale.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"an alpha arrives as {scale.dtype}, but must stay float32: shard the model with "
                "sdd.interop.torchtitan.parallelize, which the model_spec of its model_registry does"
            )
        if isinstance(input, DTensor):
            return self._of_shards(input, scale, beside)
        return self._of(input, scale, beside)

    def _of(self, z: Tensor, scale: Tensor | None, beside: Tensor | None, mesh: DeviceMesh | None = None) -> Tensor:
        if beside is not None:
            y = z * _joint_scale(z, beside, self.eps, mesh)
            return (self.factor * (y if scale is None else scale * y)).to(z.dtype)
        if mesh is not None:
            return sharded_scaled_norm(z, None if scale is None else self._multiplied(scale), mesh=mesh, eps=self.eps)
        if scale is None:
            return (self.factor * norm(z, self.eps, self.group)).to(z.dtype)
        return scaled_norm(z, self._multiplied(scale), group=self.group, eps=self.eps)

    def _of_shards(self, z: DTensor, scale: Tensor | None, beside: Tensor | None) -> DTensor:
        """The same of this process's part, so that kernels see plain tensors."""
        mesh, placements = z.device_mesh, z.placements
        cut = [axis for axis, place in enumerate(placements) if place.is_shard(z.ndim - 1) or place.is_shard(-1)]
        local = z.to_local(grad_placements=placements)
        if isinstance(scale, DTensor):
            # Where processes have other tokens, or other features under one scale, each has a summand of the gradient.
            grads = [
                own if own.is_shard() or not place.is_shard() else Partial()
                for own, place in zip(scale.placements, placements, strict=True)
            ]
            scale = scale.to_local(grad_placements=grads)
        if isinstance(beside, DTensor):
            beside = beside.to_local(grad_placements=placements)
        over = None
        if cut and self.group is None:
            over = mesh if mesh.ndim == 1 else mesh[(mesh.mesh_dim_names or ())[cut[0]]]
        y = self._of(local, scale, beside, over)
        return DTensor.from_local(y, mesh, placements, run_check=False, shape=z.shape, stride=z.stride())

    def _multiplied(self, scale: Tensor) -> Tensor:
        return scale if self.factor == 1 else self.factor * scale

    def extra_repr(self) -> str:
        """The scale's name and the settings that are not the defaults."""
        heads = "" if self.group is None else f", group={self.group}"
        return f"{self.scale_name}, initial={self.initial:.4g}, eps={self.eps:g}{heads}"


class SDDLinear(Module):
    """A fully-connected layer with its norms, `y = norm(V before(x))`: an SDD layer where `norm` has an alpha."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """The matrix, and its norms if the placement has them.

        Attributes:
            before: the site ctx, in front of the attention's output.
            linear: the matrix.
            norm: of its output.
        """

        before: Norm.Config | None = None
        linear: Linear.Config
        norm: Norm.Config | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.before = None if config.before is None else config.before.build()
        self.linear = config.linear.build()
        self.norm = None if config.norm is None else config.norm.build()

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return _or_as_it_is(self.norm, self.linear(_or_as_it_is(self.before, input)))


class JointFeedForward(FeedForward):
    """SwiGLU with one norm over gate and up together, `w2(silu(g) * u)` of `(g, u) = norm((w1 x, w3 x))`.

    `w1` and `w3` are `SDDLinear`, each with the scale of its half.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        """As `FeedForward.Config`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        gate, up = self.w1.linear(x), self.w3.linear(x)
        return self.w2(F.silu(self.w1.norm(gate, beside=up)) * self.w3.norm(up, beside=gate))


class SDDQKVLinear(QKVLinear):
    """Queries, keys and values by three projections, each with its own norm or none."""

    @dataclass(kw_only=True, slots=True)
    class Config(QKVLinear.Config):
        """As `QKVLinear.Config`, `wkv` for the keys alone.

        Attributes:
            wv: the projection of the values.
        """

        wv: Module.Config

    def __init__(self, config: Config) -> None:
        BaseQKVLinear.__init__(self, config)
        self.wq, self.wk, self.wv = config.wq.build(), config.wkv.build(), config.wv.build()


class SDDBlock(Llama3TransformerBlock):
    """A block whose norms stand where its placement says; see `sdd.placement`."""

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        """As `TransformerBlock.Config`, where a norm that is absent is None.

        Attributes:
            embed_norm: of the embedding, in the first block, so that it follows this to its pipeline stage.
            attention_post_norm: after the first residual addition.
            ffn_post_norm: after the second.
            residual: (c_x, c_f) of the two additions `c_x * x + c_f * f`.
        """

        embed_norm: Norm.Config | None = None
        attention_post_norm: Norm.Config | None = None
        ffn_post_norm: Norm.Config | None = None
        residual: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 1.0), (1.0, 1.0))

    def __init__(self, config: Config) -> None:
        TransformerBlock.__init__(self)
        self.attention = config.attention.build()
        self.feed_forward = config.feed_forward.build()
        for name in BLOCK_NORMS:
            found = getattr(config, name)
            setattr(self, name, None if found is None else found.build())
        self.residual = config.residual

    def forward(self, x: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        x = _or_as_it_is(self.embed_norm, x)
        f = self.attention(_or_as_it_is(self.attention_norm, x), attention_masks, positions)
        x = _or_as_it_is(self.attention_post_norm, _mix(self.residual[0], x, f))
        f = self.feed_forward(_or_as_it_is(self.ffn_norm, x))
        return _or_as_it_is(self.ffn_post_norm, _mix(self.residual[1], x, f))


class SDDModel(Llama3Model):
    """Llama 3 with the norms of a placement."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        """As `Llama3Model.Config`.

        Attributes:
            placement: what the config was converted to.
        """

        placement: Placement = field(default_factory=lambda: placements["sdd"])

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Take the trainer's sequence length, and declare how everything is sharded."""
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            set_sharding(self, enable_sp=config.parallelism.enable_sequence_parallel)


def _or_as_it_is(module: nn.Module | None, x: Tensor) -> Tensor:
    return x if module is None else module(x)


def _joint_scale(z: Tensor, beside: Tensor, eps: float, mesh: DeviceMesh | None) -> Tensor:
    """`1 / sqrt(mean square of both + eps)`, in at least float32; over the features of all processes of a mesh."""
    dtype = statistics_dtype(z.dtype)
    squares = torch.cat([z, beside], -1).to(dtype).square().sum(-1, keepdim=True)
    n = z.shape[-1] + beside.shape[-1]
    if mesh is not None:
        squares, n = combined(squares, mesh), n * mesh.size()
    return torch.rsqrt(squares / n + eps)


def _mix(factors: tuple[float, float], x: Tensor, f: Tensor) -> Tensor:
    c_x, c_f = factors
    return (x if c_x == 1 else c_x * x) + (f if c_f == 1 else c_f * f)
