"""The norm of experts' outputs, with each row's weight, on every path; and what its sums over rows must be."""

from typing import Any

import pytest
import torch
from helpers_kernels import EXAMPLES, HAS_TRITON, PATHS, check, drawn, dtypes, layouts, seeds
from helpers_operations import order_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdd import functional as sdd_F
from sdd import kernels
from sdd.functional import Eps
from sdd.kernels.experts import Order, expert_scaled_norm, rows_of

# rows of each of up to four experts: many have none, and sometimes one has all
counts = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=4)


def plain(z: Tensor, alpha: Tensor, order: Order, weights: Tensor | None = None, eps: Eps = 1e-6) -> Tensor:
    """By gathering each row's alpha; autograd does the rest."""
    y = alpha[order.experts_M] * sdd_F.norm(z, eps)
    return y if weights is None else weights[:, None] * y


def arguments_of(rows: list[int], z: Tensor, seed: int, weighted: bool, row_eps: bool) -> dict[str, Any]:
    return {
        "z": z,
        "alpha": drawn(seed + 1, len(rows), z.shape[1]),
        "order": order_of(rows),
        "weights": drawn(seed + 2, sum(rows)) if weighted else None,
        "eps": drawn(seed + 3, sum(rows)).square() if row_eps else 1e-3,
    }


@pytest.mark.parametrize("path", ["composed", *PATHS])
@settings(max_examples=EXAMPLES)
@given(seeds, counts, st.integers(1, 40), st.booleans(), st.booleans(), dtypes, layouts, layouts)
def test_values_and_gradients(path, seed, rows, width, weighted, row_eps, dtype, layout, gradient_layout):
    z = drawn(seed, sum(rows), width, dtype=dtype, layout=layout)
    check(path, "expert_scaled_norm", plain, arguments_of(rows, z, seed, weighted, row_eps), seed + 4, gradient_layout)


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("width", [8, 64, 2048, 4096, 5000, 8192, 20_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_widths_of_models(width, dtype):
    rows = [2, 0, 1]
    arguments = arguments_of(rows, drawn(0, 3, width, dtype=dtype), 0, True, True)
    check("triton", "expert_scaled_norm", plain, arguments, 9, "contiguous")


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@settings(max_examples=max(4, EXAMPLES // 6))
@given(seeds, counts, st.booleans(), st.booleans(), st.integers(17, 40))
def test_rows_wider_than_a_program_holds(seed, rows, weighted, row_eps, width):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "expert_norm.MAX_EXPERT": 16,
            "expert_norm.WIDE_BLOCK": 8,
            "common.COLUMN_BLOCK": 8,
        }.items():
            patch.setattr(f"sdd.kernels.fused.{name}", value)
        arguments = arguments_of(rows, drawn(seed, sum(rows), width), seed, weighted, row_eps)
        check("triton", "expert_scaled_norm", plain, arguments, seed + 4, "contiguous")


@settings(max_examples=10)
@given(seeds, counts.filter(any), st.integers(1, 6))
def test_the_reference_has_its_derivative(seed, rows, width):
    order = order_of(rows)
    z, alpha = drawn(seed, sum(rows), width).double(), drawn(seed + 1, len(rows), width).double()
    weights, eps = drawn(seed + 2, sum(rows)).double(), drawn(seed + 3, sum(rows)).double().square() + 0.1
    inputs = [x.requires_grad_() for x in (z, alpha, weights, eps)]
    assert torch.autograd.gradcheck(lambda z, a, w, e: expert_scaled_norm(z, a, order, w, eps=e), inputs)
    assert torch.autograd.gradcheck(lambda a: rows_of(a, order), inputs[1])


@pytest.mark.parametrize("path", ["composed", *PATHS])
def test_experts_without_rows_have_zero_gradients(path):
    arguments = arguments_of([0, 3, 0, 2], drawn(0, 5, 8), 0, True, False)
    arguments["alpha"].requires_grad_()
    with kernels.use(path):
        kernels.expert_scaled_norm(**arguments).square().sum().backward()
    assert (arguments["alpha"].grad.abs().sum(1) > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("path", PATHS)
def test_what_does_not_fit_is_said(path):
    arguments = arguments_of([2, 1], drawn(0, 3, 4), 0, True, False)
    for wrong in ({"alpha": drawn(0, 3, 4)}, {"order": order_of([2, 2])}, {"weights": drawn(0, 3, 1)}):
        with kernels.use(path), pytest.raises(ValueError, match=r"expected|order of 4"):
            kernels.expert_scaled_norm(**arguments | wrong)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("more", [False, True])
def test_opcheck(more):
    """Schema, fake tensors, autograd registration and AOT dispatch."""
    from sdd.kernels.fused.expert_norm import expert_norm_backward_op, expert_norm_op

    arguments = arguments_of([2, 0, 1], drawn(0, 3, 8), 0, more, more)
    z, alpha, order, weights, eps = arguments.values()
    row_eps, number = (eps, 0.0) if more else (None, eps)
    tensors = [x if x is None else x.requires_grad_() for x in (z, alpha, weights, row_eps)]
    torch.library.opcheck(expert_norm_op, (*tensors, number, order.experts_M, order.ends_E))
    z, alpha, weights, _ = (x if x is None else x.detach() for x in tensors)
    r = torch.ones(3, device=z.device)
    torch.library.opcheck(expert_norm_backward_op, (z, z, alpha, weights, r, order.experts_M, order.ends_E, more))
