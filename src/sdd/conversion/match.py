"""Choose the layers of a foreign model to convert, and say why the others stay."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sdd.block_lists import block_lists, most_of_one_type
from sdd.conversion.report import KeptLayer
from sdd.nn import SDDLinear

#: Names of the head, matched against every component of a dotted name outside the blocks.
HEADS = (
    "lm_head",
    "head",
    "heads",
    "output",
    "output_layer",
    "output_projection",
    "classifier",
    "score",
    "embed_out",
    "qa_outputs",
    "to_logits",
    "unembed",
)
#: Projections that write to the residual stream, by the names that published models give them.
OUTPUTS = (
    "o_proj",
    "down_proj",
    "out_proj",
    "c_proj",
    "wo",
    "w2",
    "fc2",
    "fc_out",
    "linear2",
    "to_out",
    "to_out.0",
    "dense_4h_to_h",
    "output.dense",
    "*attention.dense",
    "self_attn.dense",
    "*Attention.o",
    "attn.proj",
    "mlp.proj",
)
_HEAD = "the head: its outputs are logits or predictions"
_ROUTER = "a router: its outputs choose experts"
_LINEARS = (nn.Linear, SDDLinear)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Selection:
    """The layers to convert by name, the ones that stay, and how many blocks of one type each list of blocks has."""

    linears: Mapping[str, nn.Linear]
    kept: Sequence[KeptLayer]
    blocks: Mapping[str, int]
    has_head: bool


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One glob pattern or several as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a glob pattern fits the whole dotted name or its ending after a dot; `*` crosses dots."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def check_patterns(argument: str, patterns: Sequence[str], model: nn.Module) -> None:
    """Raise ValueError for a pattern that fits no `nn.Linear` of the model, with the nearest names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = [name for name, module in modules.items() if isinstance(module, _LINEARS)]
    endings = sorted({name.rpartition(".")[2] for name in linears})
    for pattern in patterns:
        if any(matches(name, [pattern]) for name in linears):
            continue
        others = [f"{name} (a {type(module).__name__})" for name, module in modules.items() if matches(name, [pattern])]
        near = get_close_matches(pattern, [*endings, *linears], n=5, cutoff=0.4)
        hint = f"it fits {others[0]}" if others else f"nearest: {', '.join(near or endings)}"
        raise ValueError(
            f"{argument}={pattern!r} fits no nn.Linear of this model ({hint}); give glob patterns of dotted names or "
            "of their endings, as in 'q_proj' or '*.layers.0.*'"
        )


def select(model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> Selection:
    """Decide for every `nn.Linear` of the model whether it is converted; nothing is changed."""
    tree = _Tree(model)
    linears: dict[str, nn.Linear] = {}
    kept: list[KeptLayer] = []
    has_head = False
    for module, names in tree.names.items():
        if not isinstance(module, _LINEARS):
            kept += _bare_matrices(names[0], module)
            continue
        guess = tree.head_or_router(names)
        has_head = has_head or guess == _HEAD
        reason = tree.obstacle(module) or _deselected(names, include, exclude)
        if reason is None and not set(names) & set(include or ()):
            reason = guess
        if reason is None and isinstance(module, nn.Linear):
            linears[names[0]] = module
        elif reason is not None:
            kept.append(KeptLayer(names[0], reason))
    return Selection(linears, kept, tree.blocks, has_head)


class _Tree:
    """The model's modules with all their names, the owners of each parameter, and the lists of blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            self.names.setdefault(module, []).append(name)
        self.owners = Counter(
            id(parameter) for module in self.names for parameter in module._parameters.values() if parameter is not None
        )
        self.heads = {id(head) for head in map(_output_embeddings, self.names) if head is not None}
        lists = block_lists(self.modules, _is_block)
        self.blocks = {name: most_of_one_type(blocks) for name, blocks in lists.items()}

    def obstacle(self, linear: nn.Linear | SDDLinear) -> str | None:
        """The reason why the layer cannot be converted, or why converting it makes no sense."""
        weight = linear._parameters.get("weight")
        if isinstance(linear, SDDLinear):
            return "already an SDDLinear"
        if parametrize.is_parametrized(linear):
            return "parametrised: its weight is computed (torch.nn.utils.parametrize)"
        if type(linear) is not nn.Linear:
            return f"a {type(linear).__name__}: a subclass of nn.Linear may compute something else"
        if "forward" in vars(linear):
            return "its forward was replaced on the instance"
        if type(weight) is not nn.Parameter:
            return f"its weight is a {type(linear.weight).__name__}, not a plain parameter"
        if weight.dtype not in _DTYPES:
            return f"its weight is {weight.dtype}, not a 16-, 32- or 64-bit float"
        if any(self.owners[id(parameter)] > 1 for parameter in linear.parameters(recurse=False)):
            return "tied: another module owns the same parameter"
        if linear.out_features == 1:
            return "one output feature: the norm of a single number is its sign"
        return None

    def head_or_router(self, names: Sequence[str]) -> str | None:
        """The reason to stay that the layer's names, or the model itself, suggest."""
        if id(self.modules[names[0]]) in self.heads or any(map(self._is_head, names)):
            return _HEAD
        return _ROUTER if any(map(self._is_router, names)) else None

    def _is_head(self, name: str) -> bool:
        # Inside a block, names such as attention.output belong to projections, not heads.
        for prefix, component in _components(name):
            path = f"{prefix}.{component}" if prefix else component
            if component in HEADS:
                return True
            if path in self.blocks or isinstance(self.modules[path], nn.ModuleList):
                return False
        return False

    def _is_router(self, name: str) -> bool:
        # A `gate` beside `experts` is a router; Llama's gate_proj is not.
        for prefix, component in _components(name):
            siblings = [sibling for sibling, _ in self.modules[prefix].named_children()]
            if "router" in component or (component == "gate" and any("expert" in sibling for sibling in siblings)):
                return True
        return False


def _components(name: str) -> list[tuple[str, str]]:
    """Each component of a dotted name with the name of the module that holds it."""
    parts = name.split(".") if name else []
    return [(".".join(parts[:i]), part) for i, part in enumerate(parts)]


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    """The head that a Hugging Face model names itself."""
    getter = getattr(module, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, _LINEARS) and any(isinstance(inner, _LINEARS) for inner in module.modules())


def _bare_matrices(name: str, module: nn.Module) -> list[KeptLayer]:
    """Matrices that belong to no `nn.Linear`: in-projections, packed experts, convolutions."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return []
    return [
        KeptLayer(f"{name}.{key}" if name else key, f"a matrix of a {type(module).__name__}, not of an nn.Linear")
        for key, value in module._parameters.items()
        if isinstance(value, Tensor) and value.ndim > 1
    ]


def _deselected(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str]) -> str | None:
    if any(matches(name, exclude) for name in names):
        return "excluded"
    if include is not None and not any(matches(name, include) for name in names):
        return "not included"
    return None
