"""The report of a conversion, layer by layer, as data and as a table."""

import json
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import nn

from sdd.conversion.experts import SDDModule
from sdd.conversion.groups import shown
from sdd.conversion.observe import ObservedLayer
from sdd.conversion.proof import Proof, prove
from sdd.conversion.spreads import error_lines, observed_lines
from sdd.conversion.table import collapse, count
from sdd.errors import UserError
from sdd.files import finite
from sdd.norm_groups import Group
from sdd.terminal import aligned

#: The version of the description that `to_json` writes.
FORMAT = 1
#: Outcomes of the proof that the other tables show: refuted layers are among those kept.
_SETTLED = ("proven", "refuted")
#: What only the report tells of a layer: not part of the description.
_TOLD = ("outside", "calibration")


@dataclass(frozen=True)
class Calibration:
    """How near an SDD layer comes to the linear layer that it replaced; see `sdd.conversion.calibrate`.

    Attributes:
        error: median over tokens of the relative error against the original model's output.
        inherited: the same if the layer had stayed linear: what the converted layers before it cause alone.
        tokens: their number; of stacked experts, that of pairs of a token and an expert.
        outliers: tokens of the original model whose rms is over 10 times the median, or under a tenth of it.
        few: the experts of a stack that fewer than 32 tokens were sent to; they were fitted on tokens of their layer
            as if these were sent to them.
    """

    error: float
    inherited: float
    tokens: int
    outliers: int = 0
    few: tuple[int, ...] = ()


@dataclass(frozen=True)
class ConvertedLayer:
    """One fully-connected layer, or one stack of experts' matrices, that became SDD.

    Attributes:
        name: dotted name in the model.
        shape: of V, `(out_features, in_features)`, after the number of experts for stacked ones.
        alpha_init: initial value of every element of alpha; after calibration, the root mean square of alpha.
        is_output: whether it was taken for a projection that writes to the residual stream.
        eps: added to the mean square, inside the root.
        group: its norm groups, as `SDDLinear` takes them; None for one.
        shared_alpha: whether all groups of a part share one alpha.
        kind: name of the class that the layer, or the module of the experts, had.
        outside: whether it stands outside the blocks of a model that has blocks.
        digest: after calibration, of V, b and alpha, see `sdd.conversion.revert`.
        calibration: how near calibration came.
    """

    name: str
    shape: tuple[int, ...]
    alpha_init: float
    is_output: bool = False
    eps: float = 1e-6
    group: Group = None
    shared_alpha: bool = False
    kind: str = "Linear"
    outside: bool = False
    digest: str | None = None
    calibration: Calibration | None = None

    @property
    def module_name(self) -> str:
        """The name of the module: of stacked experts that which holds the matrix, else the layer itself."""
        return self.name.rpartition(".")[0] if len(self.shape) == 3 else self.name

    @property
    def alpha_name(self) -> str:
        """The name of its alpha among the model's parameters."""
        return f"{self.name}_alpha" if len(self.shape) == 3 else f"{self.name}.alpha".lstrip(".")

    def description(self) -> dict[str, Any]:
        """The layer as `to_json` writes it: without what is None, and without what only the report tells."""
        return {name: value for name, value in asdict(self).items() if name not in _TOLD and value is not None}

    def remarks(self) -> str:
        """What the report says of the layer beside its shape and alpha."""
        flags = ["output"] * self.is_output + ["outside the blocks"] * self.outside
        return ", ".join([*flags, *([shown(self.group)] if self.group is not None else [])])


@dataclass(frozen=True)
class KeptLayer:
    """One fully-connected layer, or one matrix outside any, that stays as it was.

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
        converted: the layers that became SDD layers, in the model's order.
        kept: the layers and bare matrices that stay, with the reason; embeddings are not listed.
        n_layers: L, the number of blocks that the named initial values of alpha refer to.
        notes: advice about this model.
        mode: of the conversion.
        observed: with mode "observe", the scale of each layer's output.
        redrawn: whether the converted layers were given new weights.
        parameters: elements of all parameters of the model, before it was converted.
        proof: what running the model showed; None without an example. Layers that it refuted are among those kept.
    """

    converted: tuple[ConvertedLayer, ...]
    kept: tuple[KeptLayer, ...]
    n_layers: int
    notes: tuple[str, ...] = ()
    mode: str = "reinit"
    observed: tuple[ObservedLayer, ...] = ()
    redrawn: bool = False
    parameters: int = 0
    proof: Proof | None = None

    @property
    def share(self) -> float:
        """The share of the model's parameters that is in converted layers."""
        return sum(prod(layer.shape) for layer in self.converted) / max(self.parameters, 1)

    def verify(self, model: nn.Module, example: Any) -> Proof:
        """Check by running the model that it uses every converted layer as an SDD layer; see `sdd.conversion.prove`.

        Args:
            model: the converted model; it is left as it was, bit for bit, the layers refuted included.
            example: one batch: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

        Returns:
            What was found of each layer.

        Raises:
            UserError: if the report is of another model, or the model refuses the example.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        layers = {}
        for name in (layer.module_name for layer in self.converted):
            module = modules.get(name)
            if not isinstance(module, SDDModule):
                found = "is missing" if module is None else f"is a {type(module).__name__}"
                raise UserError(
                    f"the report is of another model: {name} {found} in this {type(model).__name__}; give the model "
                    "that was converted, without a wrapper"
                )
            layers[name] = module
        return prove(model, layers, example)

    def to_json(self) -> str:
        """The conversion as a description that `sdd.apply` repeats on a model of the same architecture."""
        layers = [layer.description() for layer in self.converted]
        return json.dumps({"format": FORMAT, "mode": self.mode, "n_layers": self.n_layers, "layers": layers})

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, ready for json."""
        return finite(asdict(self))

    def __str__(self) -> str:
        if self.mode == "observe":
            return "\n".join([*observed_lines(self.observed), *self._kept_lines()])
        rows = [
            (layer.name, str(list(layer.shape)), f"{layer.alpha_init:.4g}", layer.remarks()) for layer in self.converted
        ]
        lines = [*self._head_lines(), "", *aligned([("converted", "V [out, in]", "alpha", ""), *collapse(rows)])]
        errors = [(layer.name, layer.calibration.error) for layer in self.converted if layer.calibration]
        if errors:
            lines += ["", *error_lines(errors)]
        return "\n".join([*lines, *self._kept_lines()])

    def _head_lines(self) -> list[str]:
        outputs = sum(layer.is_output for layer in self.converted)
        lines = [
            f"{count(len(self.converted), 'layer')} converted{', all their weights redrawn' * self.redrawn}, "
            f"{outputs} of them output projections; L = {count(self.n_layers, 'block')}"
        ]
        if self.parameters:
            lines.append(f"{self.share:.1%} of the model's {self.parameters:,} parameters are in converted layers")
        if self.proof is not None:
            lines.append(str(self.proof).partition("\n")[0])
        return lines

    def _kept_lines(self) -> list[str]:
        lines = []
        if self.kept:
            rows = [(layer.name, layer.reason) for layer in self.kept]
            lines += ["", *aligned([("kept", "reason"), *collapse(rows)])]
        unproven = () if self.proof is None else self.proof.verdicts
        rows = [(found.name, f"{found.outcome}: {found.reason}") for found in unproven if found.outcome not in _SETTLED]
        if rows:
            lines += ["", *aligned([("unproven", "reason"), *collapse(rows)])]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return lines
