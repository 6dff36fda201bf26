"""The modules, norms, parameters and blocks of a model that a probe watches, and their names."""

from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from sdd.block_lists import block_lists, has_children
from sdd.functional import Group, resolve_group
from sdd.nn import LearnedScale, SDDExpertLinear, SDDLinear
from sdd.norm_precision import at_least_float32

Role = Literal["weight", "alpha"]

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
# These norms run over channels or over the batch, not over the last dimension.
_OTHER_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm)


class _Spread(Protocol):
    """A norm whose features are spread over processes."""

    def over_processes(self, mean_squares: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class WatchedParameter:
    """A matrix ("weight") or a norm's scale ("alpha"), and the name under which its statistics are reported."""

    name: str
    role: Role
    parameter: nn.Parameter


class WatchedModules:
    """A model's modules and parameters by the names that they have in a row of probe.jsonl.

    Args:
        model: a wrapper of torch.compile or DistributedDataParallel is looked through.

    Attributes:
        root: the model itself.
        names: the names of all modules, in the model's order.
        recorded: the modules whose output is recorded: those with parameters of their own, and norms.
        parameters: the trainable matrices and scales. A tied one is reported by the first module that owns it.
        order: the place of each possible name in a row of probe.jsonl.
        blocks: the longest list of blocks.
        reports_attention: whether some module reports its queries and keys at a probe point, so that no call needs to
            be intercepted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = _unwrapped(model)
        self.names = {module: _plain(name) for name, module in self.root.named_modules()}
        self.recorded = [
            module
            for module in self.names
            if module is not self.root and (any(True for _ in module.parameters(recurse=False)) or is_norm(module))
        ]
        self.parameters: list[WatchedParameter] = []
        self.blocks = max(block_lists(dict(self.root.named_modules())).values(), key=len, default=[])
        self.reports_attention = False
        order: list[str] = []
        owned: set[nn.Parameter] = set()
        for module, name in self.names.items():
            order.append(name)
            for leaf, parameter in module.named_parameters(recurse=False):
                watched = _watched(module, name, leaf, parameter)
                if watched is not None and parameter not in owned:
                    order.append(watched.name)
                    self.parameters += [watched] if parameter.requires_grad else []
                owned.add(parameter)
        self.order = {name: index for index, name in enumerate(dict.fromkeys(order))}

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.root.parameters()).device


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the last dimension: a module without children whose class is named so."""
    named = "norm" in type(module).__name__.lower() and not isinstance(module, _OTHER_NORMS)
    return named and not has_children(module)


def norm_ratio(module: nn.Module, z: Tensor) -> Tensor | None:
    """`eps / mean(z^2)` of each row and group that a norm or an SDD layer normalises, as one vector.

    The variance takes the place of the mean square where the norm subtracts the mean: in `nn.LayerNorm`, and in other
    classes named LayerNorm that have a bias. Where the features of a group are spread over processes (`sdd.parallel`),
    all of them must call this, and each gets the ratios of the whole.

    Args:
        module: has eps and, if it has norm groups, group.
        z: `[..., N]`.

    Returns:
        None if the module has no eps that is a number.
    """
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if eps is None and isinstance(module, nn.RMSNorm):
        eps = torch.finfo(z.dtype).eps
    if not isinstance(eps, float | int):
        return None
    axes = len(module.normalized_shape) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1
    rows = z if axes == 1 else z.flatten(-axes)
    if _subtracts_mean(module):
        return eps / rows.to(at_least_float32(z.dtype)).var(-1, correction=0).flatten()
    if getattr(module, "spans", False):
        return eps / cast("_Spread", module).over_processes(_mean_squares(rows, None))
    return eps / _mean_squares(rows, getattr(module, "group", None))


def first_tensor(value: object) -> Tensor | None:
    """A module's output or input as one floating-point tensor: the value itself, or the first of a tuple."""
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.ndim else None


def _subtracts_mean(module: nn.Module) -> bool:
    named = "layernorm" in type(module).__name__.lower() and getattr(module, "bias", None) is not None
    return named or isinstance(module, nn.LayerNorm)


def _mean_squares(z: Tensor, group: Group) -> Tensor:
    """The mean square of each row and group of the parts that have a norm, one after the other."""
    found = []
    parts = resolve_group(group, z.shape[-1])
    for piece, (_, width) in zip(z.split([width for width, _ in parts], -1), parts, strict=True):
        if width:
            heads = piece.unflatten(-1, (-1, width))
            norms = torch.linalg.vector_norm(heads, dim=-1, dtype=at_least_float32(z.dtype))
            found.append(norms.square().flatten() / width)
    return found[0] if len(found) == 1 else torch.cat(found)


def _watched(module: nn.Module, name: str, leaf: str, parameter: nn.Parameter) -> WatchedParameter | None:
    """The entry of a parameter; None for biases and other vectors."""
    is_sdd = isinstance(module, (SDDLinear, SDDExpertLinear))
    is_scale = isinstance(module, LearnedScale) or is_norm(module)
    if leaf == "alpha" if is_sdd else leaf == "weight" and is_scale:
        return WatchedParameter(name, "alpha", parameter)
    if parameter.ndim < 2:
        return None
    if leaf != "weight":
        name = f"{name}.{leaf}" if name else leaf
    return WatchedParameter(name, "weight", parameter)


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = model._modules.get("_orig_mod")
    if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module
    return model if inner is None else _unwrapped(inner)


def _plain(name: str) -> str:
    """A module's name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
