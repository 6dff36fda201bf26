"""The report of a conversion, layer by layer, as data and as a table."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import nn

from sdd.conversion.proof import Proof, prove
from sdd.conversion.table import collapse, count
from sdd.errors import UserError
from sdd.files import finite
from sdd.nn import SDDLinear
from sdd.terminal import aligned

#: Outcomes that the other tables show: refuted layers are among those kept.
_SETTLED = ("proven", "refuted")


@dataclass(frozen=True)
class ConvertedLayer:
    """One `nn.Linear` that became an `SDDLinear`.

    Attributes:
        name: dotted name in the model.
        shape: of V, `(out_features, in_features)`.
        alpha_init: initial value of every element of alpha.
        is_output: whether it was taken for a projection that writes to the residual stream.
    """

    name: str
    shape: tuple[int, int]
    alpha_init: float
    is_output: bool


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
        redrawn: whether the converted layers were given new weights.
        parameters: elements of all parameters of the model, before it was converted.
        proof: what running the model showed; None without an example. Layers that it refuted are among those kept.
    """

    converted: tuple[ConvertedLayer, ...]
    kept: tuple[KeptLayer, ...]
    n_layers: int
    notes: tuple[str, ...] = ()
    redrawn: bool = False
    parameters: int = 0
    proof: Proof | None = None

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
        for name in (layer.name for layer in self.converted):
            module = modules.get(name)
            if not isinstance(module, SDDLinear):
                found = "is missing" if module is None else f"is a {type(module).__name__}"
                raise UserError(
                    f"the report is of another model: {name} {found} in this {type(model).__name__}; give the model "
                    "that was converted, without a wrapper"
                )
            layers[name] = module
        return prove(model, layers, example)

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, ready for json."""
        return finite(asdict(self))

    def __str__(self) -> str:
        outputs = sum(layer.is_output for layer in self.converted)
        lines = [
            f"{count(len(self.converted), 'layer')} converted{', all their weights redrawn' * self.redrawn}, "
            f"{outputs} of them output projections; L = {count(self.n_layers, 'block')}"
        ]
        if self.parameters:
            share = sum(prod(layer.shape) for layer in self.converted) / self.parameters
            lines.append(f"{share:.1%} of the model's {self.parameters:,} parameters are in converted layers")
        if self.proof is not None:
            lines.append(str(self.proof).partition("\n")[0])
        rows = [
            (layer.name, str(list(layer.shape)), f"{layer.alpha_init:.4g}", "output" if layer.is_output else "")
            for layer in self.converted
        ]
        lines += ["", *aligned([("converted", "V [out, in]", "alpha", ""), *collapse(rows)])]
        if self.kept:
            rows = [(layer.name, layer.reason) for layer in self.kept]
            lines += ["", *aligned([("kept", "reason"), *collapse(rows)])]
        unproven = () if self.proof is None else self.proof.verdicts
        rows = [(found.name, f"{found.outcome}: {found.reason}") for found in unproven if found.outcome not in _SETTLED]
        if rows:
            lines += ["", *aligned([("unproven", "reason"), *collapse(rows)])]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)
