"""The blocks of a foreign model, and the projections of each that write to its residual stream."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from torch import nn

from sdd.block_lists import block_lists, most_of_one_type
from sdd.conversion.kinds import features, is_layer, told
from sdd.conversion.patterns import matches

#: Projections that write to the residual stream, by the names that published models give them, in lower case.
OUTPUTS = (
    "o_proj",
    "down_proj",
    "out_proj",
    "c_proj",
    "wo",
    "w2",
    "fc2",
    "fc_out",
    "lin2",
    "linear2",
    "linear_out",
    "out_lin",
    "to_out",
    "to_out.0",
    "dense_4h_to_h",
    "ffn_output",
    "output_dense",
    "output.dense",
    "pwconv2",
    "*attention.dense",
    "self_attn.dense",
    "*attention.o",
    "attn.proj",
    "mlp.proj",
    "mlp.3",
    "attn_layer.1.merge",
    "mlp_layer.3",
    "net.4",
)
_Lists = (nn.ModuleList, nn.ModuleDict)
_Stacks = (nn.ModuleList, nn.Sequential)


def is_output_name(name: str) -> bool:
    """Whether published models give this name, in any case, to projections that write to the residual stream."""
    return matches(name.lower(), OUTPUTS)


def stacks(modules: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """The outermost lists of blocks by name, each with its blocks, those of all its stages and types.

    Where the members of a list are stages, each holding nothing but a list of blocks and at most one layer more (Swin,
    ConvNeXt), the blocks are those of the stages, whatever single layers stand between them. A list of experts is none
    of blocks.
    """
    found = {}
    for name, members in block_lists(modules, _is_block).items():
        if "expert" in name.rpartition(".")[2]:
            continue
        # between stages may stand a layer alone, which leads from one width to the next
        stages = [_stage_blocks(member) for member in members if _n_layers(member) > 1]
        lists = list(chain.from_iterable(stages))
        if lists and all(stages):
            found[name] = list(chain.from_iterable(lists))
        else:
            found[name] = _whole(members)
    return found


def depth_of(model: nn.Module, blocks: Mapping[str, int]) -> int | None:
    """L: the blocks of the longest list, or what the config says of a model that calls one block again and again."""
    if blocks:
        return max(blocks.values())
    config_says = told(told(model, "config"), "num_hidden_layers")
    return config_says if isinstance(config_says, int) and config_says > 0 else None


def residual_outputs(blocks: Iterable[nn.Module], names: Mapping[nn.Module, Sequence[str]]) -> set[nn.Module]:
    """The layers that write to the residual stream: the last projection to its width of each branch of a block.

    Where a branch has layers of that width with a name in `OUTPUTS`, it is those.
    """
    found: set[nn.Module] = set()
    for block in blocks:
        flat = [child for child in block.children() if is_layer(child)]
        branches = list(_branches(block))
        width = _width([*branches, *([layer] for layer in flat)])
        for layers in [*branches, flat]:
            own = width if layers is flat else _returns_to(layers) or width
            to_width = [layer for layer in layers if features(layer)[1] == own]
            named = [layer for layer in to_width if any(map(is_output_name, names[layer]))]
            last = to_width[-1:] if layers is not flat else _ends(flat, width)
            found.update(named or last)
            if layers is flat:
                found.update(layer for layer in last if features(layer)[0] != width)
    return found


def _is_block(module: nn.Module) -> bool:
    return not is_layer(module) and any(map(is_layer, module.modules()))


def _n_layers(module: nn.Module) -> int:
    return sum(map(is_layer, module.modules()))


def _whole(members: list[nn.Module]) -> list[nn.Module]:
    """The blocks of all types; a member of another type with one layer is a stem or the like."""
    common = max(map(type, members), key=Counter(map(type, members)).__getitem__)
    return [member for member in members if type(member) is common or _n_layers(member) > 1]


def _stage_blocks(member: nn.Module) -> list[list[nn.Module]]:
    """The lists of blocks, each of one type, that are all a stage consists of; none if it is no stage."""
    lists: dict[str, list[nn.Module]] = {}
    for name, module in member.named_modules():
        nested = any(not outer or name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, _Stacks) and not nested and "expert" not in name:
            blocks = [child for child in module if _is_block(child)]
            if blocks and most_of_one_type(blocks) == len(blocks):
                lists[name] = blocks
    inside = sum(_n_layers(block) for blocks in lists.values() for block in blocks)
    return list(lists.values()) if _n_layers(member) - inside <= 1 else []


def _branches(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The layers of each branch of a block, in order: of each child, and of each member of a list (experts)."""
    for child in module.children():
        if is_layer(child) or not _n_layers(child):
            continue
        if isinstance(child, _Lists) or _holds_a_list(child):
            yield [layer for layer in child.children() if is_layer(layer)]
            yield from _branches(child)
        else:
            yield [layer for layer in child.modules() if is_layer(layer)]


def _holds_a_list(module: nn.Module) -> bool:
    return any(
        isinstance(inner, _Lists) and sum(_is_block(member) for member in inner.children()) > 1
        for inner in module.modules()
    )


def _width(branches: Iterable[Sequence[nn.Module]]) -> int:
    """The width of the residual stream: what most branches read first or write last."""
    ends = [size for layers in branches if layers for size in (features(layers[0])[0], features(layers[-1])[1])]
    return Counter(ends).most_common(1)[0][0] if ends else 0


def _returns_to(layers: Sequence[nn.Module]) -> int | None:
    """The width that a branch of several layers leaves and returns to, which need not be the stream's (MLP-Mixer)."""
    if len(layers) < 2:
        return None
    n_in, n_out = features(layers[0])[0], features(layers[-1])[1]
    return n_in if n_in == n_out else None


def _ends(layers: Sequence[nn.Module], width: int) -> list[nn.Module]:
    """Where branches end among layers that stand in a block side by side, in order.

    A layer from another width to that of the stream ends one (down). So does the last of some square layers
    (q, k, v, o), or a single one after a layer that leads away from the width (q|k|v, o).
    """
    ends: list[nn.Module] = []
    squares: list[nn.Module] = []
    opened = False
    for layer in layers:
        n_in, n_out = features(layer)
        if n_in == n_out == width:
            squares.append(layer)
        elif n_out == width:
            ends.append(layer)
            squares, opened = [], False
        elif n_out > width:
            ends += _last_square(squares, opened)
            squares, opened = [], True
    return [*ends, *_last_square(squares, opened)]


def _last_square(squares: list[nn.Module], opened: bool) -> list[nn.Module]:
    return squares[-1:] if opened or len(squares) > 1 else []
