"""What of a model is watched: its sites, norms, parameters and blocks."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sdd.functional import Group, resolve_group, statistics_dtype
from sdd.nn import SDDExpertLinear, SDDLinear

Role = Literal["weight", "alpha"]

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
# their norms run over channels or over the batch, not over the last dimension
_OTHER_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class WatchedParameter:
    """A matrix ("weight") or a norm's scale ("alpha"), and the site that reports it."""

    site: str
    role: Role
    parameter: nn.Parameter


class Sites:
    """A model's modules by the names that its sites have.

    Args:
        model: a wrapper of torch.compile or DistributedDataParallel is looked through.

    Attributes:
        root: the model itself.
        names: of all modules, in the model's order.
        watched: the modules whose output is recorded: those with parameters of their own, and norms.
        parameters: the trainable matrices and scales, each once.
        blocks: the longest list of blocks.
        tells_attention: whether a module was met that shows its queries and keys at a point, so that no call needs to
            be intercepted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = _unwrapped(model)
        self.names = {module: _plain(name) for name, module in self.root.named_modules()}
        self.watched = [
            module
            for module in self.names
            if module is not self.root and (any(True for _ in module.parameters(recurse=False)) or is_norm(module))
        ]
        self.parameters = [
            _watched_parameter(module, self.names[module], leaf, parameter)
            for parameter, (module, leaf) in self._owners().items()
            if parameter.requires_grad and (parameter.ndim > 1 or _is_scale(module, leaf))
        ]
        self.blocks = _blocks(self.root)
        self.tells_attention = False

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next(self.root.parameters()).device

    def order(self) -> dict[str, int]:
        """The place of each possible site in a row of probe.jsonl."""
        parameters: dict[str, list[str]] = {}
        for parameter, (module, leaf) in self._owners().items():
            if parameter.ndim > 1 and leaf != "weight" and not _is_scale(module, leaf):
                parameters.setdefault(self.names[module], []).append(_joined(self.names[module], leaf))
        names = [site for name in self.names.values() for site in (name, *parameters.get(name, ()))]
        return {name: index for index, name in enumerate(names)}

    def _owners(self) -> dict[nn.Parameter, tuple[nn.Module, str]]:
        """The first module that owns each parameter, and the parameter's name there."""
        owners: dict[nn.Parameter, tuple[nn.Module, str]] = {}
        for module in self.names:
            for leaf, parameter in module.named_parameters(recurse=False):
                owners.setdefault(parameter, (module, leaf))
        return owners


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the last dimension, by the name of its class."""
    named = "norm" in type(module).__name__.lower() and not isinstance(module, _OTHER_NORMS)
    return named and next(module.children(), None) is None


def norm_ratio(module: nn.Module, z: Tensor) -> Tensor | None:
    """`eps / mean(z^2)` of each row and group of what a norm or an SDDLinear normalises; a vector.

    The variance stands for the mean square where the norm subtracts the mean: in `nn.LayerNorm`, and in other classes
    named LayerNorm that have a bias.

    Args:
        module: says eps and group.
        z: `[..., N]`.

    Returns:
        None if the module does not say its eps.
    """
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if eps is None and isinstance(module, nn.RMSNorm):
        eps = torch.finfo(z.dtype).eps
    if not isinstance(eps, float | int):
        return None
    axes = len(module.normalized_shape) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1
    rows = z if axes == 1 else z.flatten(-axes)
    if subtracts_mean(module):
        return eps / rows.to(statistics_dtype(z.dtype)).var(-1, correction=0).flatten()
    return eps / _mean_squares(rows, getattr(module, "group", None))


def subtracts_mean(module: nn.Module) -> bool:
    """Whether a norm subtracts the mean before it divides."""
    if isinstance(module, nn.LayerNorm):
        return True
    return "layernorm" in type(module).__name__.lower() and getattr(module, "bias", None) is not None


def first_tensor(value: object) -> Tensor | None:
    """A module's output or input as one floating tensor: itself, or the first of a tuple."""
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.ndim else None


def _mean_squares(z: Tensor, group: Group) -> Tensor:
    """The mean square of each row and group of the parts that have a norm, one after the other."""
    found = []
    parts = resolve_group(group, z.shape[-1])
    for piece, (_, width) in zip(z.split([width for width, _ in parts], -1), parts, strict=True):
        if width:
            heads = piece.unflatten(-1, (-1, width))
            norms = torch.linalg.vector_norm(heads, dim=-1, dtype=statistics_dtype(z.dtype))
            found.append(norms.square().flatten() / width)
    return found[0] if len(found) == 1 else torch.cat(found)


def _watched_parameter(module: nn.Module, name: str, leaf: str, parameter: nn.Parameter) -> WatchedParameter:
    if parameter.ndim > 1 and not _is_scale(module, leaf):
        return WatchedParameter(name if leaf == "weight" else _joined(name, leaf), "weight", parameter)
    return WatchedParameter(name, "alpha", parameter)


def _is_scale(module: nn.Module, leaf: str) -> bool:
    if isinstance(module, (SDDLinear, SDDExpertLinear)):
        return leaf == "alpha"
    return leaf == "weight" and is_norm(module)


def _blocks(root: nn.Module) -> list[nn.Module]:
    """The children of the longest list of blocks; of lists within lists, as those of experts, the outermost counts."""
    longest: list[nn.Module] = []
    seen: list[str] = []
    for name, module in root.named_modules():
        nested = any(not outer or name.startswith(f"{outer}.") for outer in seen)
        if nested or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = [child for child in module.children() if next(child.children(), None) is not None]
        if len(blocks) > 1:
            seen.append(name)
            longest = max(longest, blocks, key=len)
    return longest


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _joined(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
