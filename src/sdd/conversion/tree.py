"""The modules of a foreign model with what their place says about them: names, owners, blocks, heads, routers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sdd.conversion.kinds import features, is_layer, told
from sdd.conversion.outputs import stacks

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
    "*_head",
    "*_heads",
    "logits",
    "class_*",
    "bbox_*",
    "seq_relationship",
)
HEAD = "the head: its outputs are logits or predictions"
UNREAD = "taken for a head: it stands outside the blocks, and no other layer reads an input of its size"
ROUTER = "a router: its outputs choose experts"
ADAPTER = "an adapter, or what one wraps"
DECAY = "it sets the time step or the decay of a state, whose range was chosen"
#: Attributes of a model or its config that say how many labels or tokens it predicts.
_SIZES = ("vocab_size", "num_labels", "num_classes", "n_classes")
#: A router's names in use; those of the second row are ones of a GLU too, unless experts stand beside them.
_ROUTERS = ("*router*", "routing", "switch", "gate_network")
_GATES = ("gate", "gating", "wg", "w_gate")
#: Input channels of a convolution up to here are those of a picture or a sound.
_COLOURS = 4
_DECAYS = ("dt_proj", "in_proj_ba", "in_proj_a", "in_proj_b")
_LOW_RANK = ("lora_a", "lora_b", "lora_down", "lora_up", "base_layer")


def components(name: str) -> list[tuple[str, str]]:
    """Each component of a dotted name with the name of the module that holds it."""
    parts = name.split(".") if name else []
    return [(".".join(parts[:i]), part) for i, part in enumerate(parts)]


def fits(component: str, patterns: Iterable[str]) -> bool:
    """Whether one component of a name fits a pattern."""
    return any(fnmatchcase(component, pattern) for pattern in patterns)


class Tree:
    """The model's modules with all their names, the owners of each parameter, and the lists of blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            self.names.setdefault(module, []).append(name)
        self.owners = Counter(
            id(parameter) for module in self.names for parameter in module._parameters.values() if parameter is not None
        )
        self.heads = {id(head) for head in map(_output_embeddings, self.names) if head is not None}
        self.stacks = stacks(self.modules)
        self.blocks = {name: len(blocks) for name, blocks in self.stacks.items()}
        self.inside = {inner for blocks in self.stacks.values() for block in blocks for inner in block.modules()}
        self.sizes = set(_sizes(self.names))
        self.read = set(_read_widths(self.names))

    def outside(self, layer: nn.Module) -> bool:
        """Whether a layer stands outside the blocks of a model that has blocks."""
        return bool(self.blocks) and layer not in self.inside

    def obstacle(self, layer: nn.Module) -> str | None:
        """The reason why a layer that computes `x W^T + b` cannot be converted, or why that makes no sense."""
        n_in, n_out = features(layer)
        if "forward" in vars(layer):
            return "its forward was replaced on the instance"
        if self.tied(layer):
            return "tied: another module owns the same parameter"
        if n_out == 1:
            return "one output feature: the norm of a single number is its sign"
        if n_in == 1:
            return "one input feature: the norm would erase its magnitude"
        return None

    def tied(self, module: nn.Module) -> bool:
        """Whether another module owns one of the module's parameters too."""
        return any(self.owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))

    def role(self, names: Sequence[str]) -> str | None:
        """The reason to stay that the layer's names, its place, or the model itself suggest."""
        module = self.modules[names[0]]
        if id(module) in self.heads or any(map(self._is_head, names)):
            return HEAD
        if any(self._is_router(name, features(module)[1]) for name in names):
            return ROUTER
        if any(map(self._is_adapter, names)):
            return ADAPTER
        if any(map(self._is_decay, names)):
            return DECAY
        if self.outside(module):
            n_out = features(module)[1]
            if n_out in self.sizes:
                return HEAD
            if n_out not in self.read:
                return UNREAD
        return None

    def _is_head(self, name: str) -> bool:
        # Inside a block, names such as attention.output belong to projections, not heads.
        for prefix, component in components(name):
            path = f"{prefix}.{component}" if prefix else component
            if fits(component, HEADS) or (component == "fc" and path == name):
                return True
            if path in self.blocks or isinstance(self.modules[path], nn.ModuleList):
                return False
        return False

    def _is_router(self, name: str, n_out: int) -> bool:
        # A `gate` beside `experts` is a router; Llama's gate_proj is not.
        for prefix, component in components(name):
            if fits(component, _ROUTERS):
                return True
            experts = self._experts_beside(prefix)
            last = f"{prefix}.{component}".lstrip(".") == name
            if fits(component, _GATES) and (None in experts or n_out in experts):
                return True
            if last and n_out in experts:
                return True
        return False

    def _experts_beside(self, prefix: str) -> set[int | None]:
        """The numbers of experts in the children of a module; None among them if a child is named so."""
        found: set[int | None] = set()
        for name, child in self.modules[prefix].named_children():
            path = f"{prefix}.{name}" if prefix else name
            if "expert" in name:
                found.add(None)
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and path not in self.blocks:
                members = list(child.children())
                if len(members) > 1 and len(set(map(type, members))) == 1 and has_layers(members[0]):
                    found.add(len(members))
            found |= {len(value) for value in stacked_matrices(child).values()}
        return found

    def _is_decay(self, name: str) -> bool:
        prefix, _, last = name.rpartition(".")
        return last in _DECAYS and "A_log" in self.modules[prefix]._parameters

    def _is_adapter(self, name: str) -> bool:
        for prefix, component in components(name):
            children = [child.lower() for child, _ in self.modules[prefix].named_children()]
            wraps = "base_layer" in children or sum(child in _LOW_RANK for child in children) > 1
            if wraps or fits(component.lower(), ("*lora_*", "*adapter*", "dora_*")):
                return True
        return False


def has_layers(module: nn.Module) -> bool:
    """Whether a module holds, or is, a fully-connected layer."""
    return any(map(is_layer, module.modules()))


def stacked_matrices(module: nn.Module) -> dict[str, Tensor]:
    """The three-dimensional parameters of a module that is no convolution: matrices of experts, stacked."""
    if isinstance(module, _ConvNd):
        return {}
    return {key: value for key, value in module._parameters.items() if value is not None and value.ndim == 3}


def impure(layer: nn.Module) -> str | None:
    """Why a layer's weight is no plain matrix of parameters; None if it is."""
    if parametrize.is_parametrized(layer):
        return "parametrised: its weight is computed (torch.nn.utils.parametrize)"
    return None


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    """The head that a Hugging Face model names itself."""
    getter = told(module, "get_output_embeddings")
    try:
        head = getter() if callable(getter) else None
    except Exception:  # of a model that has none
        return None
    return head if isinstance(head, nn.Module) else None


def _sizes(modules: Iterable[nn.Module]) -> Iterator[int]:
    """The sizes that models and their configs give for labels and vocabularies."""
    for module in modules:
        for owner in (module, told(module, "config")):
            for attribute in _SIZES:
                value: Any = told(owner, attribute)
                if type(value) is int and not isinstance(module, (nn.Embedding, nn.modules.batchnorm._NormBase)):
                    yield value


def _read_widths(modules: Iterable[nn.Module]) -> Iterator[int]:
    """The sizes of input that some module reads: layers, convolutions, norms, and what else has matrices."""
    for module in modules:
        if is_layer(module):
            yield features(module)[0]
            continue
        for value in module._parameters.values():
            if value is None or is_lazy(value):
                continue
            if isinstance(module, _ConvNd):
                if module.in_channels > _COLOURS:
                    yield module.in_channels
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                yield value.shape[-1]
            elif value.ndim > 1 or "norm" in type(module).__name__.lower():
                yield from value.shape
