"""Norm groups along the features (one group, heads, or parts with their own groups) and the elements of alpha."""

from collections.abc import Sequence

from torch import Tensor

#: The `group` argument: None (one group), a group width, or consecutive `(width, group_width)` parts.
Group = int | Sequence[tuple[int, int]] | None


class Parts(tuple[tuple[int, int], ...]):
    """A `group` argument that `resolve_group` has resolved: consecutive `(width, group_width)` parts.

    group_width is 0 for a plain part. `resolve_group` returns a `Parts` unchanged, so that a layer resolves its groups
    once, when it is built, and passes the result as `group` in every forward pass.
    """

    __slots__ = ()


def resolve_group(group: Group, width: int) -> Parts:
    """Turn a `group` argument into consecutive `(width, group_width)` parts that add up to `width`.

    Args:
        group: None for one group of full width, an int for groups of that width (heads), or a list of
            `(width, group_width)` for consecutive parts; group_width 0 marks a plain part (neither norm nor alpha).
            A `Parts` is returned as it is, unchecked.
        width: the number of output features N.

    Raises:
        ValueError: if the parts do not add up to `width` or a part is not a whole number of groups.
    """
    if isinstance(group, Parts):
        return group
    if group is None:
        return Parts([(width, width)])
    if isinstance(group, int):
        if group <= 0 or width % group:
            raise ValueError(
                f"group={group} does not divide the {width} output features: give a divisor, or None for one group"
            )
        return Parts([(width, group)])
    parts = Parts((int(part), int(group_width)) for part, group_width in group)
    for part, group_width in parts:
        if part <= 0 or group_width < 0 or (group_width and part % group_width):
            raise ValueError(
                f"part ({part}, {group_width}) is not a whole number of groups: give (width, group_width) with "
                "group_width dividing width, or 0 for a plain part"
            )
    total = sum(part for part, _ in parts)
    if total != width:
        raise ValueError(f"the parts {list(parts)} add up to {total}, expected the {width} output features")
    return parts


def alpha_size(parts: Sequence[tuple[int, int]], shared: bool) -> int:
    """Number of elements of alpha: one for each normed feature, or if `shared` one group width for each normed part."""
    return sum(group_width if shared else width for width, group_width in parts if group_width)


def split_alpha(alpha: Tensor, parts: Parts) -> list[Tensor]:
    """Split alpha into one piece for each part, empty for a plain part. Its size shows whether groups share it.

    Raises:
        ValueError: if alpha has neither of the two sizes that the parts allow.
    """
    for shared in (False, True):
        if alpha.shape == (alpha_size(parts, shared),):
            sizes = [(group_width if shared else width) if group_width else 0 for width, group_width in parts]
            return list(alpha.split(sizes))
    raise ValueError(
        f"alpha has shape {list(alpha.shape)}, expected [{alpha_size(parts, False)}] (one scale a normed feature) "
        f"or [{alpha_size(parts, True)}] (shared by the groups of each part) for the parts {list(parts)}"
    )
