"""Choose the layers of a foreign model to convert, and say why the others stay."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from sdd.conversion import patterns
from sdd.conversion.experts import expert_keys, expert_obstacle, expert_parts, has_experts
from sdd.conversion.groups import GroupChoice, choose
from sdd.conversion.kinds import is_layer, not_linear, unwritable
from sdd.conversion.outputs import is_output_name, residual_outputs
from sdd.conversion.patterns import as_patterns as as_patterns
from sdd.conversion.patterns import matches as matches
from sdd.conversion.report import KeptLayer
from sdd.conversion.tree import Tree, impure, stacked_matrices
from sdd.nn import SDDLinear
from sdd.norm_groups import Group

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FROZEN = "frozen: its weight does not require gradients"
_ZERO = "its weight is zero, as at the end of a branch that is to start without effect"
_BIAS = "its bias was set on purpose, as for a gate or a time step, and redrawing would lose it"
#: Above every bias that nn.Linear draws for 4 inputs or more, and far above what initialisations in use draw.
_LARGE_BIAS = 0.5


@dataclass(frozen=True)
class Selection:
    """The layers to convert by name, the ones that stay, and what the place of each says.

    Attributes:
        linears: fully-connected layers to convert, by name.
        kept: layers and matrices that stay.
        blocks: how many blocks each list of blocks has, by its name.
        has_head: whether a head was found.
        experts: stacked matrices to convert, by name: the module that holds them, and the name there.
        outputs: names of what writes to the residual stream.
        outside: names of what is converted outside the blocks of a model that has blocks.
        groups: norm groups by name, where they are not one group.
        order: the place of each name in the model.
        notes: what could not be found out.
    """

    linears: Mapping[str, nn.Linear]
    kept: Sequence[KeptLayer]
    blocks: Mapping[str, int]
    has_head: bool
    experts: Mapping[str, tuple[nn.Module, str]]
    outputs: Collection[str]
    outside: Sequence[str]
    groups: Mapping[str, Group]
    order: Mapping[str, int]
    notes: Sequence[str] = ()


def check_patterns(argument: str, given: Sequence[str], model: nn.Module) -> None:
    """Raise ValueError for a pattern that fits no `nn.Linear` of the model, with the nearest names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = [name for name, module in modules.items() if is_layer(module)]
    layers += [
        _join(name, key) for name, module in modules.items() if has_experts(module) for key in expert_keys(module)
    ]
    patterns.check_patterns(argument, given, layers, {name: type(module).__name__ for name, module in modules.items()})


def select(
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    *,
    output: Sequence[str] | None = None,
    group: GroupChoice = None,
    redraw: bool = True,
) -> Selection:
    """Decide for every layer of the model whether it is converted; nothing is changed.

    Args:
        model: any module.
        include: patterns of the layers to convert; None for all.
        exclude: patterns of the layers to leave.
        output: patterns of what writes to the residual stream; None to find it by structure and names.
        group: norm groups, see `sdd.conversion.groups`.
        redraw: whether converted layers get new values, so that what was set on purpose would be lost.
    """
    tree = Tree(model)
    chooser = _Chooser(tree, include, exclude, redraw)
    linears: dict[str, Any] = {}
    experts: dict[str, tuple[nn.Module, str]] = {}
    for module, names in tree.names.items():
        if is_layer(module):
            if chooser.takes(names[0], names, chooser.obstacle(module, names), module):
                linears[names[0]] = module
        elif has_experts(module):
            for key in expert_keys(module):
                aliases = [_join(name, key) for name in names]
                obstacle = expert_obstacle(module, key) or (_tied(tree, module, key))
                if chooser.takes(aliases[0], aliases, obstacle, module, key):
                    experts[aliases[0]] = (module, key)
            chooser.kept += _bare_matrices(names[0], module, expert_keys(module))
        else:
            chooser.kept += _bare_matrices(names[0], module, ())
    groups, notes = _groups(tree, linears, group)
    groups |= {name: parts for name, (module, key) in experts.items() if (parts := expert_parts(module, key))}
    order = {name: i for i, name in enumerate(chooser.taken)}
    outside = [name for name, layer in linears.items() if tree.outside(layer)]
    outputs = _outputs(tree, linears, experts) if output is None else {name for name in order if matches(name, output)}
    return Selection(
        linears, chooser.kept, tree.blocks, chooser.has_head, experts, outputs, outside, groups, order, tuple(notes)
    )


class _Chooser:
    """Collects the reasons of the layers that stay."""

    def __init__(self, tree: Tree, include: Sequence[str] | None, exclude: Sequence[str], redraw: bool) -> None:
        self.tree, self.include, self.exclude, self.redraw = tree, include, exclude, redraw
        self.kept: list[KeptLayer] = []
        self.taken: list[str] = []
        self.has_head = False
        self.marked = _set_on_purpose(tree, redraw)

    def takes(
        self, name: str, names: Sequence[str], obstacle: str | None, module: nn.Module, key: str = "weight"
    ) -> bool:
        """Whether to convert; if not, note the reason."""
        guess = self._guess(names, module, key)
        reason = obstacle or _deselected(names, self.include, self.exclude)
        if reason is None and not set(names) & set(self.include or ()):
            reason = guess
        if reason is not None:
            self.kept.append(KeptLayer(name, reason))
        else:
            self.taken.append(name)
        return reason is None

    def obstacle(self, layer: nn.Module, names: Sequence[str]) -> str | None:
        """The reason why a layer cannot be converted; no choice of the user overrules it."""
        if isinstance(layer, SDDLinear):
            return "already an SDDLinear"
        weight = layer._parameters.get("weight")
        if (reason := impure(layer)) is not None:
            return reason
        if any(isinstance(self.tree.modules[name.rpartition(".")[0]], nn.MultiheadAttention) for name in names):
            return f"a {type(layer).__name__}: nn.MultiheadAttention reads its weight without calling it"
        if type(weight) is not nn.Parameter and not isinstance(layer, LazyModuleMixin):
            return f"its weight is a {type(layer.weight).__name__}, not a plain parameter"
        if weight is not None and weight.dtype not in _DTYPES:
            return f"its weight is {weight.dtype}, not a 16-, 32- or 64-bit float"
        return unwritable(weight) or not_linear(layer) or self.tree.obstacle(layer)

    def _guess(self, names: Sequence[str], module: nn.Module, key: str) -> str | None:
        """The reason to stay that holds unless the user names the layer."""
        if key == "weight":
            role = self.tree.role(names)
            self.has_head = self.has_head or (role is not None and "head" in role)
            if role is not None:
                return role
        weight = module._parameters.get(key)
        if weight is None or is_lazy(weight):
            return None
        if not weight.requires_grad:
            return _FROZEN
        return self.marked.get(module) if key == "weight" else None


def _outputs(tree: Tree, linears: Mapping[str, nn.Module], experts: Mapping[str, tuple[nn.Module, str]]) -> set[str]:
    """The names of what writes to the residual stream: by structure in the blocks, by name elsewhere."""
    structural = residual_outputs([block for blocks in tree.stacks.values() for block in blocks], tree.names)
    found = {name for name, (_, key) in experts.items() if key == "down_proj"}
    for name, layer in linears.items():
        if layer in structural or (layer not in tree.inside and any(map(is_output_name, tree.names[layer]))):
            found.add(name)
    return found


def _groups(tree: Tree, linears: Mapping[str, nn.Module], choice: GroupChoice) -> tuple[dict[str, Group], list[str]]:
    groups: dict[str, Group] = {}
    notes = []
    for name, layer in linears.items():
        group, note = choose(name, layer, tree.modules[name.rpartition(".")[0]], choice)
        if group is not None:
            groups[name] = group
        if note is not None:
            notes.append(note)
    return groups, notes


def _tied(tree: Tree, module: nn.Module, key: str) -> str | None:
    return "tied: another module owns the same parameter" if tree.is_tied(module.get_parameter(key)) else None


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _set_on_purpose(tree: Tree, redraw: bool) -> dict[nn.Module, str]:
    """The layers whose weight is zero, or whose bias would be lost in a redraw, with the reason to leave them.

    Where that holds for half of all layers, it was not the author's purpose, but memory that nobody has filled yet.
    """
    layers: list[Any] = [module for module in tree.names if is_layer(module)]
    layers = [layer for layer in layers if _is_filled(layer._parameters.get("weight"))]
    zeros = [layer for layer in layers if not _any(layer.weight)]
    biases = [
        layer
        for layer in layers
        if redraw and _is_filled(layer._parameters.get("bias")) and _is_unlike_a_draw(layer.bias)
    ]
    marked: dict[nn.Module, str] = {}
    for reason, found in ((_BIAS, biases), (_ZERO, zeros)):
        if 2 * len(found) < len(layers):
            marked |= dict.fromkeys(found, reason)
    return marked


def _is_filled(value: Any) -> TypeGuard[Tensor]:
    return type(value) is nn.Parameter and not value.is_meta


def _any(weight: Tensor) -> bool:
    """Whether a weight has an element other than zero; one row first, which spares reading a large matrix."""
    return bool(weight[:1].any() or weight.any())


@torch.no_grad()
def _is_unlike_a_draw(bias: Any) -> bool:
    """Whether a bias has one value other than zero, or values larger than any common initialisation draws."""
    if not _is_filled(bias) or not bias.any():
        return False
    one_value = len(bias) > 1 and bool((bias == bias[0]).all())
    return one_value or bool(bias.float().abs().mean() > _LARGE_BIAS)


def _bare_matrices(name: str, module: nn.Module, taken: Sequence[str]) -> list[KeptLayer]:
    """Matrices that belong to no `nn.Linear`: in-projections, packed experts, convolutions."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return []
    stacked = stacked_matrices(module)
    kind = type(module).__name__
    return [
        KeptLayer(
            _join(name, key),
            f"stacked matrices of a {kind}, which does not go through transformers' interface for experts"
            if key in stacked and len(value) > 1 and "xpert" in f"{name}{kind}"
            else f"a matrix of a {kind}, not of an nn.Linear",
        )
        for key, value in module._parameters.items()
        if isinstance(value, Tensor) and value.ndim > 1 and key not in taken and not key.endswith("_bias")
    ]


def _deselected(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str]) -> str | None:
    if any(matches(name, exclude) for name in names):
        return "excluded"
    if include is not None and not any(matches(name, include) for name in names):
        return "not included"
    return None
