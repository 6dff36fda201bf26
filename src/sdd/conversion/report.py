"""The report of a conversion, layer by layer, as data and as a table."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdd.conversion.groups import shown
from sdd.files import finite
from sdd.norm_groups import Group
from sdd.terminal import aligned


@dataclass(frozen=True)
class ConvertedLayer:
    """One fully-connected layer, or one stack of experts' matrices, that became SDD.

    Attributes:
        name: dotted name in the model.
        shape: of V, `(out_features, in_features)`, after the number of experts for stacked ones.
        alpha_init: initial value of every element of alpha.
        is_output: whether it was taken for a projection that writes to the residual stream.
        group: its norm groups, as `SDDLinear` takes them; None for one.
        eps: added to the mean square, inside the root.
        outside: whether it stands outside the blocks of a model that has blocks.
    """

    name: str
    shape: tuple[int, ...]
    alpha_init: float
    is_output: bool
    group: Group = None
    eps: float = 1e-6
    outside: bool = False

    def remarks(self) -> str:
        """What the report says of the layer beside its shape and alpha."""
        flags = ["output"] * self.is_output + ["outside the blocks"] * self.outside
        return ", ".join([*flags, *([shown(self.group)] if self.group is not None else [])])


@dataclass(frozen=True)
class KeptLayer:
    """One `nn.Linear`, or one matrix outside any `nn.Linear`, that stays as it was.

    Attributes:
        name: dotted name of the layer, or of the parameter.
        reason: why it stays.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """The result of `sdd.convert`; `print` shows it as a table in which repeated blocks share a line.

    Attributes:
        converted: the layers that became `SDDLinear`, in the model's order.
        kept: the layers and bare matrices that stay, with the reason; embeddings are not listed.
        n_layers: L, the number of blocks that the named initial values of alpha refer to.
        notes: advice about this model.
    """

    converted: tuple[ConvertedLayer, ...]
    kept: tuple[KeptLayer, ...]
    n_layers: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, ready for json."""
        return finite(asdict(self))

    def __str__(self) -> str:
        outputs = sum(layer.is_output for layer in self.converted)
        lines = [
            f"{_count(len(self.converted), 'layer')} converted, {outputs} of them output projections; "
            f"L = {_count(self.n_layers, 'block')}"
        ]
        rows = [
            (layer.name, str(list(layer.shape)), f"{layer.alpha_init:.4g}", layer.remarks()) for layer in self.converted
        ]
        lines += ["", *aligned([("converted", "V [out, in]", "alpha", ""), *collapse(rows)])]
        if self.kept:
            rows = [(layer.name, layer.reason) for layer in self.kept]
            lines += ["", *aligned([("kept", "reason"), *collapse(rows)])]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)


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


def _count(number: int, noun: str) -> str:
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
