"""Steps of an optimiser that keep the lengths of weights.

With W a matrix of a block's projection, W' the same after the optimiser's step without decay, and n(A) = A / |A|:

    unit        the rows or columns of W' are brought to length 1 (a placement's `weights`; see `sdd.models.unit`)
    rows        each row of W' is brought to the length that the row of W has: weight normalisation (arXiv 1602.07868)
                with lengths that are not learned
    hyperball   W <- R n(W - lr R n(u)),   u = W - W',   R = |W|,   |A| the Frobenius norm (arXiv 2606.16899)

"unit" reaches embedding and head too; the others leave them, routers, alphas and norms to the optimiser. Of experts,
each has its own matrix. Weight decay would change lengths only, so it is switched off where lengths are kept.

No state is needed: a length is the same before every step as at first, but for the rounding of float32 numbers, whose
errors are independent from element to element. Lengths themselves are float64. Sharded matrices (DTensors) are measured
whole.
"""

import torch
from torch import nn
from torch.optim import Optimizer

from sdd.models.unit import length_of, make_unit, projections, rescale

_MATRIX = (-2, -1)


class WeightRule:
    """Takes an optimiser's steps under the rule that a run names for its weights.

    Args:
        model: a `LanguageModel`.
        optimizer: has groups as `sdd.param_groups` makes them; the matrices under a rule are put into groups of their
            own, without decay.
        name: of the rule, see `RunConfig.weight_rule`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, name: str) -> None:
        self.name = name
        self._model, self._optimizer = model, optimizer
        self._projections = list(projections(model))
        if self.name != "free":
            under = {weight for weight, _ in self._projections}
            if self.name == "unit":
                under |= {
                    weight for name, weight in model.named_parameters() if name in ("embed.weight", "head.weight")
                }
            _without_decay(optimizer, under)

    @torch.no_grad()
    def step(self) -> None:
        """Let the optimiser use the gradients, then bring the weights to their lengths."""
        match self.name:
            case "unit":
                self._optimizer.step()
                make_unit(self._model)
            case "rows":
                lengths = [length_of(weight, (-1,)) for weight, _ in self._projections]
                self._optimizer.step()
                for (weight, _), length in zip(self._projections, lengths, strict=True):
                    rescale(weight, length, (-1,))
            case "hyperball":
                self._hyperball_step()
            case _:
                self._optimizer.step()

    def _hyperball_step(self) -> None:
        before = [weight.detach().clone() for weight, _ in self._projections]
        self._optimizer.step()
        rates = {weight: group["lr"] for group in self._optimizer.param_groups for weight in group["params"]}
        for (weight, _), old in zip(self._projections, before, strict=True):
            R = length_of(old, _MATRIX)
            u = old - weight
            rescale(u, rates[weight] * R, _MATRIX)
            weight.copy_(old - u)
            rescale(weight, R, _MATRIX)


def _without_decay(optimizer: Optimizer, under: set[nn.Parameter]) -> None:
    """Move these parameters into groups of their own that have no weight decay."""
    for group in list(optimizer.param_groups):
        named = list(zip(group["params"], group["names"], strict=True))
        moved = [pair for pair in named if pair[0] in under]
        left = [pair for pair in named if pair[0] not in under]
        if moved:
            optimizer.param_groups.append({**group, **_members(moved), "weight_decay": 0.0})
            group |= _members(left)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _members(pairs: list[tuple[nn.Parameter, str]]) -> dict[str, list]:
    return {"params": [weight for weight, _ in pairs], "names": [name for _, name in pairs]}
