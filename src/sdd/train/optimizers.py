"""Optimisers that torch lacks in this form: StableAdamW, and Muon over stacks of matrices and over shards.

Both work on plain parameters and on those that FSDP2 has sharded, with the same numbers but for rounding. Every state
is float32 if the parameters are, and a pure function of the gradients, so a resumed run equals an unbroken one.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.optim import Optimizer

#: Of the Newton-Schulz iteration, see `orthogonalise`; those of torch.optim.Muon.
_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
#: The root mean square of an update of AdamW in units of the rate, which Muon's is given (arXiv 2502.16982).
_RMS = 0.2

Groups = Iterable[Any]
Closure = Callable[[], Any] | None


class StableAdamW(Optimizer):
    """AdamW with update clipping (arXiv 2304.13013, algorithm 2).

    With m and u AdamW's two moments after they took in the gradient g, both corrected for their start at zero:

        rate = lr / max(1, sqrt(mean(g^2 / max(u, eps^2))))        the mean over one tensor
        p   <- p - rate * weight_decay * p - rate * m / (sqrt(u) + eps)

    So a tensor whose gradient is suddenly larger than its second moment expects takes a smaller step. The experts of
    one stack count as one tensor.

    Args:
        groups: parameter groups.
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the root of u.
        weight_decay: multiplied by the clipped rate.
    """

    def __init__(
        self,
        groups: Groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = _evaluated(closure)
        found = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        ratios = [self._take_in(p, group) for group, p in found]
        totals = _over_shards(ratios, [p for _, p in found])
        for (group, p), total in zip(found, totals, strict=True):
            self._move(p, group, (total / p.numel()).sqrt().clamp(min=1.0))
        return loss

    def start(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before the first step."""
        moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), dtype=torch.float32), **moments}

    def _take_in(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Bring the moments up to date; returns the sum of `g^2 / max(u, eps^2)` over the part held here."""
        assert p.grad is not None
        (beta1, beta2), eps = group["betas"], group["eps"]
        state = self.state[p] = self.state[p] or self.start(p)
        state["step"] += 1
        g, exp_avg, exp_avg_sq = (_local(value) for value in (p.grad, state["exp_avg"], state["exp_avg_sq"]))
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        u = exp_avg_sq / (1 - beta2 ** state["step"].item())
        least = max(eps**2, torch.finfo(u.dtype).tiny)  # the square of a small eps is zero in float32
        return (g.square() / u.clamp_(min=least)).sum()

    def _move(self, p: Tensor, group: dict[str, Any], clip: Tensor) -> None:
        state = self.state[p]
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        rate = group["lr"] / clip
        root = (_local(state["exp_avg_sq"]) / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = _local(state["exp_avg"]) / root
        _local(p).mul_(1 - rate * group["weight_decay"]).sub_(update.mul_(rate / (1 - beta1**step)))


class Muon(Optimizer):
    """Momentum with orthogonalised updates, for the matrices inside a model.

    As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`; B is the momentum and O a matrix `[m, n]`:

        B <- momentum * B + (1 - momentum) * g
        O  = orthogonalise((1 - momentum) * g + momentum * B)
        p <- p - lr * weight_decay * p - lr * 0.2 * sqrt(max(m, n)) * O

    The factor gives an update the root mean square 0.2 lr, about that of AdamW, so that one rate and one weight decay
    serve both (arXiv 2502.16982). Unlike torch's, it takes stacks of matrices and shards:

    - a parameter of more than two dimensions is a stack, and each of its matrices is orthogonalised by itself;
    - a matrix of which FSDP2 gives each process some rows is gathered, and every process orthogonalises the whole of
      it; of a stack, each process has whole matrices, and nothing is gathered.

    Args:
        groups: parameter groups of parameters with two or more dimensions.
        lr: learning rate.
        momentum: of B.
        weight_decay: multiplied by the rate as it is given, without the factor.
    """

    def __init__(self, groups: Groups, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon takes matrices and stacks of them, not a tensor of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def start(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before the first step."""
        return {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}

    def _move(self, p: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        assert p.grad is not None
        state = self.state[p] = self.state[p] or self.start(p)
        g, buffer = _local(p.grad), _local(state["momentum_buffer"])
        buffer.lerp_(g, 1 - momentum)
        update = _orthogonalised(_like(g.lerp(buffer, momentum), p))
        _local(p).mul_(1 - lr * weight_decay).add_(update, alpha=-lr * _RMS * math.sqrt(max(p.shape[-2:])))


class Together(Optimizer):
    """Several optimisers that step as one: one list of parameter groups, one state.

    Args:
        parts: the optimisers by name. Each of their groups gets the name of its optimiser as `"rule"`.
    """

    def __init__(self, **parts: Optimizer) -> None:
        for name, part in parts.items():
            for group in part.param_groups:
                group["rule"] = name
        super().__init__([group for part in parts.values() for group in part.param_groups], {})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let each part update its own parameters."""
        loss = _evaluated(closure)
        for name, part in self.parts.items():
            # anew at every step, since loading a state dict replaces both
            part.state, part.param_groups = self.state, [g for g in self.param_groups if g["rule"] == name]
            part.step()
        return loss


def orthogonalise(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Bring all singular values of each matrix near 1: about `U V^T` of its singular value decomposition `U S V^T`.

    Five Newton-Schulz iterations `X <- a X + (b A + c A^2) X` with `A = X X^T` from `X / ||X||`; they leave singular
    values between 0.5 and 1.5 or so, apart from tiny ones (https://kellerjordan.github.io/posts/muon/).

    Args:
        matrices: `[..., m, n]`.
        dtype: of the products; by default bfloat16 on a GPU, and on a CPU, where bfloat16 is slower, that of the
            matrices.

    Returns:
        The same shape, in that dtype.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(dtype or (torch.bfloat16 if matrices.is_cuda else matrices.dtype)).reshape(-1, *matrices.shape[-2:])
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if x.shape[-2] <= x.shape[-1] else wide.mT).reshape(matrices.shape)


def _orthogonalised(update: Tensor) -> Tensor:
    """The part of the orthogonalised matrices that this process holds."""
    if not isinstance(update, DTensor):
        return orthogonalise(update).to(update.dtype)
    if update.ndim > 2 and all(_keeps_matrices_whole(place) for place in update.placements):
        return orthogonalise(update.to_local()).to(update.dtype)
    mesh = update.device_mesh
    thin: Any = update.to(torch.bfloat16) if update.is_cuda else update  # half the bytes to gather
    whole = DTensor.from_local(orthogonalise(_gathered(thin)), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=update.placements).to_local().to(update.dtype)


def _keeps_matrices_whole(place: Placement) -> bool:
    """Whether a placement of a stack of matrices leaves each on one process, or on several."""
    return place.is_replicate() or getattr(place, "dim", None) == 0  # FSDP2's own kind of shard is no `Shard`


def _gathered(tensor: DTensor) -> Tensor:
    """The whole of a sharded tensor, gathered over one dimension of the mesh after the other."""
    for dim in range(tensor.device_mesh.ndim):
        tensor = tensor.redistribute(placements=[Replicate()] * (dim + 1) + list(tensor.placements[dim + 1 :]))
    return tensor.to_local()


def _over_shards(sums: Sequence[Tensor], owners: Sequence[Tensor]) -> list[Tensor]:
    """Add up the sums that belong to sharded tensors, in one exchange for each kind; the others are whole already."""
    totals = list(sums)
    kinds: dict[Any, list[int]] = {}
    for place, owner in enumerate(owners):
        if isinstance(owner, DTensor):
            # copies of a part on several processes count once
            parts = tuple(Replicate() if where.is_replicate() else Partial() for where in owner.placements)
            kinds.setdefault((owner.device_mesh, parts), []).append(place)
    for (mesh, parts), places in kinds.items():
        here = torch.stack([sums[place] for place in places])
        added = DTensor.from_local(here, mesh, parts, run_check=False).full_tensor()
        for place, total in zip(places, added, strict=True):
            totals[place] = total
    return totals


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; changes of it are changes of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(part: Tensor, owner: Tensor) -> Tensor:
    """A part as a sharded tensor, if its owner is one."""
    if not isinstance(owner, DTensor):
        return part
    layout = {"shape": owner.shape, "stride": owner.stride()}
    return DTensor.from_local(part, owner.device_mesh, owner.placements, run_check=False, **layout)


def _evaluated(closure: Closure) -> Any:
    """The loss of a closure, which makes the gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
