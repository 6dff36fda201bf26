"""The report of a conversion, layer by layer, as data and as a table."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdd.conversion.observe import ObservedLayer
from sdd.conversion.spreads import error_lines, observed_lines
from sdd.files import finite
from sdd.norm_groups import Group
from sdd.terminal import aligned

#: The version of the description that `to_json` writes.
FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """How near an SDD layer comes to the linear layer that it replaced; see `sdd.conversion.calibrate`.

    Attributes:
        error: median over tokens of the relative error against the original model's output.
        inherited: the same if the layer had stayed linear: what the converted layers before it cause alone.
        tokens: their number.
        outliers: tokens of the original model whose rms is over 10 times the median, or under a tenth of it.
    """

    error: float
    inherited: float
    tokens: int
    outliers: int = 0


@dataclass(frozen=True)
class ConvertedLayer:
    """One `nn.Linear` that became an `SDDLinear`.

    Attributes:
        name: dotted name in the model.
        shape: of V, `(out_features, in_features)`.
        alpha_init: initial value of every element of alpha; after calibration, the root mean square of alpha.
        is_output: whether it was taken for a projection that writes to the residual stream.
        eps: of the norm.
        group: of the norm.
        shared_alpha: of the norm.
        digest: after calibration, of V, b and alpha, see `sdd.conversion.revert`.
        calibration: how near calibration came.
    """

    name: str
    shape: tuple[int, int]
    alpha_init: float
    is_output: bool
    eps: float = 1e-6
    group: Group = None
    shared_alpha: bool = False
    digest: str | None = None
    calibration: Calibration | None = None


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
        mode: of the conversion.
        observed: with mode "observe", the scale of each layer's output.
    """

    converted: tuple[ConvertedLayer, ...]
    kept: tuple[KeptLayer, ...]
    n_layers: int
    notes: tuple[str, ...] = ()
    mode: str = "reinit"
    observed: tuple[ObservedLayer, ...] = ()

    def to_json(self) -> str:
        """The conversion as a description that `sdd.apply` repeats on a model of the same architecture."""
        layers = [
            {name: value for name, value in asdict(layer).items() if name != "calibration" and value is not None}
            for layer in self.converted
        ]
        return json.dumps({"format": FORMAT, "mode": self.mode, "n_layers": self.n_layers, "layers": layers})

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, ready for json."""
        return finite(asdict(self))

    def __str__(self) -> str:
        if self.mode == "observe":
            return "\n".join([*observed_lines(self.observed), *self._kept_lines()])
        outputs = sum(layer.is_output for layer in self.converted)
        lines = [
            f"{_count(len(self.converted), 'layer')} converted, {outputs} of them output projections; "
            f"L = {_count(self.n_layers, 'block')}"
        ]
        rows = [
            (layer.name, str(list(layer.shape)), f"{layer.alpha_init:.4g}", "output" if layer.is_output else "")
            for layer in self.converted
        ]
        lines += ["", *aligned([("converted", "V [out, in]", "alpha", ""), *collapse(rows)])]
        errors = [(layer.name, layer.calibration.error) for layer in self.converted if layer.calibration]
        if errors:
            lines += ["", *error_lines(errors)]
        return "\n".join([*lines, *self._kept_lines()])

    def _kept_lines(self) -> list[str]:
        lines = []
        if self.kept:
            rows = [(layer.name, layer.reason) for layer in self.kept]
            lines += ["", *aligned([("kept", "reason"), *collapse(rows)])]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return lines


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
