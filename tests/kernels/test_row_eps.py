"""An eps for each row, and positions for each row, in float64: every path that takes it, gradients of eps included."""

from collections.abc import Callable

import pytest
import torch
from helpers_kernels import DEVICE, drawn
from torch import Tensor

from sdd import functional as sdd_F
from sdd import kernels


def wide(seed: int, *shape: int) -> Tensor:
    return drawn(seed, *shape).double().requires_grad_()


COS, SIN = (table[torch.tensor([[[0, 1, 2]], [[4, 5, 6]]])].to(DEVICE) for table in sdd_F.rope_tables(7, 4))
#: Calls of `(z, other, alpha, other alpha, eps)` by operation.
CALLS: dict[str, Callable[..., Tensor]] = {
    "scaled_norm": lambda z, _, alpha, bias, eps: kernels.scaled_norm(z, alpha, bias, group=4, eps=eps),
    "sdd_swiglu": lambda z, up, *alphas_eps: kernels.sdd_swiglu(z, up, *alphas_eps[:2], eps=alphas_eps[2], up_eps=1e-2),
    "up_eps": lambda z, up, a, b, eps: kernels.sdd_swiglu(z, up, a, b, eps=1e-2, up_eps=eps),
    "joint": lambda z, up, a, b, eps: kernels.sdd_swiglu(z, up, a, b, joint=True, eps=eps),
    "bare up": lambda z, up, a, b, eps: kernels.sdd_swiglu_bare_up(z, up, a, b, eps=eps)[0],
    "pre-norm": lambda z, x, a, b, eps: sum(kernels.residual_prenorm(z, x, a, b, eps=eps), torch.zeros(())),
    "qk": lambda z, _, a, _b, eps: kernels.qk_norm_rope(z, a, COS, SIN, n_heads=2, group=4, eps=eps),
    "qk, full width": lambda z, _, a, _b, eps: kernels.qk_norm_rope(z, a, COS, SIN, n_heads=2, eps=eps),
}


@pytest.mark.parametrize("name", CALLS)
def test_composed_and_recomputed_gradients_of_eps_agree_in_float64(name: str) -> None:
    leaves = [wide(0, 2, 3, 8), wide(1, 2, 3, 8), wide(2, 8), wide(3, 8)]
    eps = (wide(4, 2, 3).detach().square() + 1e-2).requires_grad_()
    found = []
    for path in ("composed", "recompute"):
        with kernels.use(path):
            y = CALLS[name](*leaves, eps)
        dy = drawn(5, *y.shape).double()
        found.append([y, *torch.autograd.grad(y, [*leaves, eps], dy, materialize_grads=True)])
        assert found[-1][-1].abs().min() > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["composed", "recompute"])
@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str, path: kernels.Path) -> None:
    leaves = [wide(0, 2, 3, 8), wide(1, 2, 3, 8), wide(2, 8), wide(3, 8)]
    eps = (wide(4, 2, 3).detach().square() + 1e-1).requires_grad_()
    with kernels.use(path):
        assert torch.autograd.gradcheck(CALLS[name], [*leaves, eps], fast_mode=True)
