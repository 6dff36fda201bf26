"""A conversion on trial: what the proof refutes is put back, and an example that fails leaves the model as it was."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from sdd.conversion.experts import SDDModule
from sdd.conversion.proof import Passes, Proof, Refused, Verdict, prove
from sdd.errors import UserError


class Trial:
    """The model before its conversion, which must take the example in training and in evaluation mode.

    Args:
        model: not yet converted.
        example: one batch; see `sdd.conversion.proof.as_call`.

    Raises:
        UserError: if the model refuses the example; it is as it was.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        passes = Passes(model, example)
        self.before = passes.state
        for training in (True, False):
            passes.run(training, grad=training)

    def prove(self, layers: Mapping[str, SDDModule]) -> Proof:
        """Prove the converted layers, putting back those that are refuted, until the rest stands.

        Raises:
            UserError: if the converted model refuses the example, or every layer is refuted; the model is as it was.
        """
        try:
            return self._prove(dict(layers))
        except Refused as error:
            self.before.restore()
            raise UserError(f"once converted, {error}; it took it before, so exclude the layers to blame") from error
        except BaseException:
            self.before.restore()
            raise

    def _prove(self, layers: dict[str, SDDModule]) -> Proof:
        order = list(layers)
        refuted: dict[str, Verdict] = {}
        while layers:
            proof = prove(self.model, layers, self.example)
            wrong = [verdict for verdict in proof.verdicts if verdict.outcome == "refuted"]
            if not wrong:
                found = {**refuted, **{verdict.name: verdict for verdict in proof.verdicts}}
                return replace(proof, verdicts=tuple(found[name] for name in order))
            for verdict in wrong:
                refuted[verdict.name] = verdict
                self.before.restore(layers.pop(verdict.name))
        reasons = "; ".join(dict.fromkeys(verdict.reason for verdict in refuted.values()))
        raise UserError(f"nothing to convert: the proof refuted every layer ({reasons})")
