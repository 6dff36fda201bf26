"""Rows of dotted names, merged where repeated blocks share them."""

from collections.abc import Iterable, Sequence


def collapse(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Merge rows that differ only in the numbers of their dotted name: `layers.{0..29}.q_proj`.

    Args:
        rows: tuples of which the first element is a dotted name.

    Returns:
        The merged rows, each at the place of its first member.
    """
    split = [(tuple(name.split(".")), columns) for name, *columns in rows]
    for position in reversed(range(max((len(parts) for parts, _ in split), default=0))):
        merged: dict[tuple[tuple[str | None, ...], tuple[str, ...]], list[int]] = {}
        for parts, columns in split:
            if position < len(parts) and parts[position].isdecimal():
                hole = (*parts[:position], None, *parts[position + 1 :])
                merged.setdefault((hole, tuple(columns)), []).append(int(parts[position]))
            else:
                merged[(parts, tuple(columns))] = []
        split = [
            (tuple(_ranges(numbers) if part is None else part for part in parts), list(columns))
            for (parts, columns), numbers in merged.items()
        ]
    return [(".".join(parts), *columns) for parts, columns in split]


def count(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ranges(numbers: Sequence[int]) -> str:
    """`3`, `{0..29}`, or `{0..3,5}`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
    return text if text.isdecimal() else f"{{{text}}}"
