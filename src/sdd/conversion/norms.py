"""The norm of each layer to convert, from the `group` argument of `sdd.convert`."""

from collections.abc import Mapping

from torch import nn

from sdd.conversion.calibrate import Norms
from sdd.conversion.match import matches
from sdd.norm_groups import Group, resolve_group


def norms_for(linears: Mapping[str, nn.Linear], group: Group | Mapping[str, Group], eps: float) -> dict[str, Norms]:
    """The norm of each layer.

    Args:
        linears: the layers by name.
        group: for all layers, or by pattern; the first pattern that fits a layer's name counts, and a layer that none
            fits has one group.
        eps: added to the mean square, inside the root.

    Raises:
        ValueError: if a pattern fits no layer, or a group does not fit the layers that it is for.
    """
    by_pattern = group if isinstance(group, Mapping) else {"*": group}
    for pattern in by_pattern:
        if not any(matches(name, [pattern]) for name in linears):
            raise ValueError(
                f"group={{{pattern!r}: ...}} fits none of the layers to convert, such as {next(iter(linears))}"
            )
    found = {}
    for name, linear in linears.items():
        chosen = next((by_pattern[pattern] for pattern in by_pattern if matches(name, [pattern])), None)
        try:
            found[name] = Norms(resolve_group(chosen, linear.out_features), eps)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found
