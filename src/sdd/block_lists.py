"""Where the repeated blocks of a model stand, whatever its author called them."""

from collections import Counter
from collections.abc import Callable, Mapping

from torch import nn


def has_children(module: nn.Module) -> bool:
    """Whether a module holds others, as a block does and a layer does not."""
    return next(module.children(), None) is not None


def block_lists(
    modules: Mapping[str, nn.Module], is_block: Callable[[nn.Module], bool] = has_children
) -> dict[str, list[nn.Module]]:
    """The outermost lists of blocks, by name: each ModuleList or Sequential with two or more blocks of one type.

    A list inside another (experts in a block) is left out: it may be longer than the model is deep. A Sequential of
    unlike parts (an encoder and a decoder) is no list of blocks, and the lists inside its parts count.

    Args:
        modules: all modules of the model by dotted name, outer ones first.
        is_block: which members of a list are blocks.
    """
    lists: dict[str, list[nn.Module]] = {}
    for name, module in modules.items():
        nested = any(not outer or name.startswith(f"{outer}.") for outer in lists)
        if not nested and isinstance(module, (nn.ModuleList, nn.Sequential)):
            blocks = [child for child in module if is_block(child)]
            if most_of_one_type(blocks) > 1:
                lists[name] = blocks
    return lists


def most_of_one_type(blocks: list[nn.Module]) -> int:
    """How many of the blocks have the most frequent type."""
    return max(Counter(map(type, blocks)).values(), default=0)
