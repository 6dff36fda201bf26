"""The closed form of calibration, see `sdd.conversion.calibrate`: least squares over tokens of equal weight."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdd.errors import UserError
from sdd.functional import norm, statistics_dtype
from sdd.norm_groups import Parts

#: A token whose output is this many times larger than the median one is a sink, so many times smaller faint. Norms
#: bring both to the common scale, however few they are.
FAR = 10.0


@dataclass(frozen=True)
class Norms:
    """The norm that a layer is to get.

    Attributes:
        parts: its groups, resolved.
        eps: added to the mean square, inside the root.
        shared_alpha: one alpha of group width for all groups of a part.
    """

    parts: Parts
    eps: float = 1e-6
    shared_alpha: bool = False


def closed_form(pairs: Iterable[tuple[Tensor, Tensor]], norms: Norms, name: str) -> Tensor:
    """Alpha by least squares over tokens of equal weight, see `sdd.conversion.calibrate`.

    Args:
        pairs: `W x` and `W x*` of some tokens, both `[tokens, N]`.
        norms: the groups and eps.
        name: of the layer, for messages.

    Returns:
        Alpha in float64; an output that is always 0 gets the value of its whole part.

    Raises:
        UserError: if a value is not finite.
    """
    features = [(norm_in_parts(z, norms), u) for z, u in pairs]
    return least_squares(features, norms.parts, name, norms.shared_alpha)


def least_squares(
    pairs: Iterable[tuple[Tensor, Tensor]], parts: Iterable[tuple[int, int]], name: str, shared: bool = False
) -> Tensor:
    """`sum_t w f u / sum_t w f^2` for each output, with `w = 1 / mean(u^2)` over each token's group.

    Args:
        pairs: the features f and the target u of some tokens, both `[tokens, N]`.
        parts: `(width, group_width)` of consecutive outputs; those of group width 0 are left out.
        name: of the layer, for messages.
        shared: one value for each place in a group.

    Raises:
        UserError: if a value is not finite.
    """
    parts, totals = tuple(parts), torch.zeros(())
    for f, u in pairs:
        w = _weights(u, parts)
        sums = ((w * product).sum(0, dtype=torch.float64) for product in (f * u, f.square()))
        totals = totals.to(u.device) + torch.stack(list(sums))
    if not totals.isfinite().all():
        raise UserError(
            f"{name} puts out values that are not finite on these batches: look at the model or the batches"
        )
    spans = [(totals[:, start:stop], width) for start, stop, width in _spans(parts) if width]
    return torch.cat([_ratio(total.unflatten(1, (-1, width)).sum(1) if shared else total) for total, width in spans])


def _ratio(totals: Tensor) -> Tensor:
    """First row over second; where the second is 0, since an output is always 0, the ratio of their sums."""
    tiny = torch.finfo(totals.dtype).tiny
    (top, bottom), (whole, of) = totals, totals.sum(1)
    return torch.where(bottom > 0, top / bottom.clamp_min(tiny), whole / of.clamp_min(tiny))


def _spans(parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """First feature, last feature + 1 and group width of each part."""
    start = 0
    for width, group_width in parts:
        yield start, start + width, group_width
        start += width


def norm_in_parts(z: Tensor, norms: Norms) -> Tensor:
    """`norm(z)` by groups, without alpha, at least float32; plain parts as they are."""
    pieces = [
        norm(z[..., start:stop], norms.eps, width) if width else z[..., start:stop].float()
        for start, stop, width in _spans(norms.parts)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _weights(u: Tensor, parts: Iterable[tuple[int, int]]) -> Tensor:
    """`1 / mean(u^2)` over each token's group, for each of its features; 0 where all are 0."""
    pieces = []
    for start, stop, width in _spans(parts):
        wide = u[..., start:stop].to(statistics_dtype(u.dtype))
        groups = wide.unflatten(-1, (-1, width or stop - start))
        square = groups.square().mean(-1, keepdim=True)
        weight = torch.where(square > 0, 1 / square.clamp_min(torch.finfo(square.dtype).tiny), 0)
        weight = weight.masked_fill(square.isinf(), torch.nan)  # too large to be told from infinity
        pieces.append(weight.expand_as(groups).flatten(-2))
    return torch.cat(pieces, -1)


def has_size(u: Tensor) -> bool:
    """Whether a token of `[tokens, N]` has a mean square other than 0, so that a coefficient can be fitted to it."""
    return bool(u.to(statistics_dtype(u.dtype)).square().any())


def token_errors(y: Tensor, target: Tensor) -> Tensor:
    """`|y - target| / |target|` of each token whose target is not 0, float32 `[tokens]`."""
    y, target = (value.reshape(-1, value.shape[-1]).float() for value in (y, target))
    size = target.norm(dim=-1)
    return ((y - target).norm(dim=-1) / size)[size > 0]


def median(parts: Sequence[Tensor]) -> float:
    """The median of some numbers in pieces; 0 of none."""
    numbers = torch.cat(list(parts))
    return numbers.median().item() if numbers.numel() else 0.0


def outliers(z: Tensor) -> tuple[int, int]:
    """How many tokens of `[tokens, N]` have an rms over 10 times the median, and how many one under a tenth of it."""
    size = z.float().square().mean(-1).sqrt()
    middle = size.median()
    return int((size > FAR * middle).sum()), int((size * FAR < middle).sum())


def token_mask(batch: Any) -> Tensor | None:
    """Where a batch's `attention_mask` `[B, T]` has tokens; None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def counted_rows(z: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of the tokens that count, `[tokens, N]`; all where the mask has another shape."""
    return z.reshape(-1, z.shape[-1]) if mask is None or mask.shape != z.shape[:-1] else z[mask.to(z.device)]
