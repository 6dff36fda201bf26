r"""The closed form of calibration for stacked experts: alpha for each expert and output, from the tokens sent to it.

Routing: the converted model chooses the experts of its tokens itself, as it will do later. For each pair of a token and
an expert that it chooses, the target is what that expert of the original gives for the same token's hidden state in the
original, whether the original would choose it or not. So inputs and targets are always of the same tokens.

An expert that few tokens are sent to is fitted on tokens of its layer as if they were sent to it: a stack cannot stay
plain in part, since its experts share one function.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdd.conversion.closed_form import Norms, closed_form, median, outliers, token_errors
from sdd.conversion.experts import (
    after_first,
    after_last,
    expert_keys,
    expert_parts,
    expert_shape,
    interleaved,
    normed,
    product,
    side_by_side,
    with_bias,
)
from sdd.conversion.lockstep import Stop
from sdd.kernels.experts import Order, dispatch, sort_by_expert
from sdd.norm_groups import resolve_group

#: An expert with fewer tokens is fitted on others of its layer.
FEW = 32
#: At most so many of these, evenly spaced: their outputs are in memory for all such experts at once.
SPARE = 512


@dataclass(frozen=True)
class Stack:
    """A module of experts, and which of its matrices get a norm.

    Attributes:
        module: the experts.
        names: by the name that a matrix has there, its name in the model.
        eps: added to the mean square, inside the root.
    """

    module: Any
    names: Mapping[str, str]
    eps: float = 1e-6

    @property
    def n_experts(self) -> int:
        """The number of experts."""
        return len(self.module.down_proj)

    def norms(self, key: str) -> Norms:
        """The norm of one expert's outputs, those of gate before those of up."""
        return Norms(resolve_group(expert_parts(self.module, key), expert_shape(self.module, key)[1]), self.eps)


class Call(NamedTuple):
    """What a module of experts is called with: tokens `[N, I]`, their experts and their weights, `[N, K]`."""

    x: Tensor
    experts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, stop: Stop) -> "Call":
        """The arguments, whether given by place or by name."""
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = dict(zip(names, stop.args, strict=False)) | dict(stop.kwargs)
        return cls(*(given[name] for name in names))

    def counts(self, mask: Tensor | None) -> Tensor:
        """Which tokens count, `[N]`; all where the mask has others."""
        if mask is None or mask.numel() != len(self.x):
            return torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        return mask.flatten().to(self.x.device)


def joined(calls: Sequence[Call], masks: Sequence[Tensor | None]) -> tuple[Call, Tensor, Tensor]:
    """The calls of several passes as one, with the tokens `[N]` and the pairs `[N, K]` of it that count.

    A pair of weight 0 does not: some models send a token that skips its expert to the first one so (Zaya).
    """
    whole = Call(*(torch.cat(values) for values in zip(*calls, strict=True)))
    counts = torch.cat([call.counts(mask) for call, mask in zip(calls, masks, strict=True)])
    return whole, counts, counts.unsqueeze(1) & (whole.weights != 0)


class Rows(NamedTuple):
    """Pairs of a token and an expert, sorted by expert.

    Attributes:
        x: their inputs of a projection in the model that is being made, `[M, I]`.
        true: the same in the given model.
        counts: which pairs count, `[M]`.
        order: the expert of each.
    """

    x: Tensor
    true: Tensor
    counts: Tensor
    order: Order

    @classmethod
    def of(cls, x: Tensor, true: Tensor, counts: Tensor, experts: Tensor, n_experts: int) -> "Rows":
        """The rows of tokens `[N, I]` and their experts `[N, K]`; counts `[N, K]` too."""
        order = sort_by_expert(experts, n_experts)
        return cls(dispatch(x, order), dispatch(true, order), counts.flatten()[order.pairs_M], order)

    def by_expert(self) -> Iterator[Tensor]:
        """The places of each expert's rows that count."""
        start = 0
        for end in self.order.ends_E.tolist():
            yield start + self.counts[start:end].nonzero().flatten()
            start = end


class StackFitting(ABC):
    """Fits one coefficient for each expert and output, when the passes first stop at a module of experts.

    The first half of the passes is the given model, the second half the one that is being made. All of the latter are
    routed as one batch, so that an expert sees the tokens of all batches at once.

    Args:
        stacks: by name of the module.
        masks: the tokens of each batch that count.
        max_error: with a larger median error, the matrices of one name are left as they are.

    Attributes:
        coefficients: by name of the matrices, float64 `[experts, out_features]`.
        stays: names of the matrices that are left as they are.
        few: by name of the module, the experts that fewer than `FEW` tokens were sent to.
    """

    def __init__(
        self, stacks: Mapping[str, Stack], masks: Sequence[Tensor | None], max_error: float | None = None
    ) -> None:
        self.coefficients: dict[str, Tensor] = {}
        self.stays: set[str] = set()
        self.few: dict[str, tuple[int, ...]] = {}
        self._stacks, self._masks = stacks, masks
        self._limit = float("inf") if max_error is None else max_error
        self._errors: dict[str, list[Tensor]] = {}
        self._inherited: dict[str, list[Tensor]] = {}

    @abstractmethod
    def fit(self, stack: Stack, key: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The coefficients from z and u of each expert's tokens."""

    @abstractmethod
    def put_out(self, stack: Stack, key: str, z: Tensor, coefficient: Tensor, order: Order) -> Tensor:
        """`coefficient * f(z)` of each row."""

    def target(self, stack: Stack, key: str, z: Tensor, order: Order) -> Tensor:
        """u: what the given model puts out, without bias, where its product is z."""
        return z

    @torch.no_grad()
    def visit(self, name: str, stops: Mapping[int, Stop]) -> dict[int, Tensor]:
        """Answer the passes that have stopped at a module of experts."""
        stack, n = self._stacks[name], len(self._masks)
        calls = {index: Call.of(stop) for index, stop in stops.items()}
        made = {index: call for index, call in calls.items() if index >= n}
        if not made:
            return {}
        # Without a call of the given model on the same tokens, what the experts give here is the target.
        old = [calls.get(index - n, call).x for index, call in made.items()]
        true = [x if x.shape == one.x.shape else one.x for x, one in zip(old, made.values(), strict=True)]
        call, tokens, pairs = joined(list(made.values()), [self._masks[index - n] for index in made])
        if not pairs.any():
            return {}
        rows = [Rows.of(call.x, torch.cat(true), pairs, call.experts, stack.n_experts)]
        if name not in self.few:
            self.few[name] = tuple(e for e, places in enumerate(rows[0].by_expert()) if len(places) < FEW)
            if self.few[name]:
                rows.append(_spare(call.x[tokens], torch.cat(true)[tokens], self.few[name], stack.n_experts))
        for key in expert_keys(stack.module):
            rows = self._project(name, key, rows)
        if self.stays.issuperset(stack.names.values()):
            return {}
        y = after_last(stack.module, rows[0].x, call.weights, rows[0].order).to(call.x.dtype)
        return dict(zip(made, y.split([len(one.x) for one in made.values()]), strict=True))

    def fewer(self) -> dict[str, tuple[int, ...]]:
        """By name of the matrices, the experts that few tokens were sent to."""
        return {full: self.few.get(name, ()) for name, stack in self._stacks.items() for full in stack.names.values()}

    def errors(self) -> dict[str, float]:
        """By name of the matrices, the median error a pair of token and expert."""
        return {name: median(found) for name, found in self._errors.items()}

    def inherited(self) -> dict[str, float]:
        """The same with z in the place of `coefficient * f(z)`."""
        return {name: median(found) for name, found in self._inherited.items()}

    def tokens(self) -> dict[str, int]:
        """How many pairs of a token and an expert counted."""
        return {name: sum(map(len, found)) for name, found in self._errors.items()}

    def _project(self, name: str, key: str, rows: Sequence[Rows]) -> list[Rows]:
        """Take rows through one projection, which is fitted if that has not been done."""
        stack = self._stacks[name]
        module, full = stack.module, stack.names.get(key)
        z = [product(module, key, part.x, part.order) for part in rows]
        u = [self.target(stack, key, product(module, key, part.true, part.order), part.order) for part in rows]
        y = z
        if full is not None:
            first = full not in self.coefficients
            if first:
                self.coefficients[full] = self.fit(stack, key, self._pairs(name, rows, z, u))
            found = self.coefficients[full]
            fitted = [self.put_out(stack, key, z_part, found, part.order) for z_part, part in zip(z, rows, strict=True)]
            counts = rows[0].counts
            self._errors.setdefault(full, []).append(token_errors(fitted[0][counts], u[0][counts]))
            self._inherited.setdefault(full, []).append(token_errors(z[0][counts], u[0][counts]))
            if first and self.errors()[full] > self._limit:
                self.stays.add(full)
            y = z if full in self.stays else fitted
        return [self._passed(stack, key, *parts) for parts in zip(rows, y, u, strict=True)]

    def _pairs(
        self, name: str, rows: Sequence[Rows], z: Sequence[Tensor], u: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Z and u of the tokens that each expert is fitted on."""
        places = [list(part.by_expert()) for part in rows]
        chosen = [(-1 if e in self.few[name] else 0, e) for e in range(self._stacks[name].n_experts)]
        return [(z[part][places[part][e]], u[part][places[part][e]]) for part, e in chosen]

    @staticmethod
    def _passed(stack: Stack, key: str, rows: Rows, y: Tensor, u: Tensor) -> Rows:
        """The inputs of the next projection."""
        outputs = [with_bias(stack.module, key, value, rows.order) for value in (y, u)]
        if key != "down_proj":
            outputs = [after_first(stack.module, value) for value in outputs]
        return rows._replace(x=outputs[0], true=outputs[1])


class StackCalibration(StackFitting):
    """Alpha, with `f(z) = norm(z)`."""

    def __init__(
        self, stacks: Mapping[str, Stack], masks: Sequence[Tensor | None], max_error: float | None = None
    ) -> None:
        super().__init__(stacks, masks, max_error)
        self.outliers: dict[str, int] = {}
        self._dtypes = {
            name: torch.promote_types(getattr(stack.module, key).dtype, torch.float32)
            for stack in stacks.values()
            for key, name in stack.names.items()
        }

    def fit(self, stack: Stack, key: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Alpha of each expert, and how many of its tokens are far from its usual scale."""
        name = stack.names[key]
        self.outliers[name] = sum(sum(outliers(u)) for _, u in pairs if len(u))
        return fit_experts(stack, key, pairs)

    def alpha(self, name: str) -> Tensor:
        """Alpha as the module will have it."""
        return self.coefficients[name].to(self._dtypes[name])

    def put_out(self, stack: Stack, key: str, z: Tensor, coefficient: Tensor, order: Order) -> Tensor:
        """`alpha * norm(z)` as the converted module computes it."""
        return normed(stack.module, key, z, self.alpha(stack.names[key]), order, stack.eps)


def fit_experts(stack: Stack, key: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Alpha of each expert, float64 `[experts, out_features]`, from z and u of its tokens.

    Raises:
        UserError: if a value is not finite.
    """
    norms, name = stack.norms(key), stack.names[key]
    found = []
    for z, u in pairs:
        z, u = (side_by_side(stack.module, key, value) for value in (z, u))
        found.append(closed_form([(z, u)], norms, name))
    return interleaved(stack.module, key, torch.stack(found))


def _spare(x: Tensor, true: Tensor, few: Sequence[int], n_experts: int) -> Rows:
    """Tokens of the layer, evenly spaced, as if each were sent to all of these experts."""
    places = torch.linspace(0, len(x) - 1, min(len(x), SPARE), device=x.device).round().long()
    experts = torch.tensor(few, device=x.device).expand(len(places), -1)
    return Rows.of(x[places], true[places], torch.ones_like(experts, dtype=torch.bool), experts, n_experts)
