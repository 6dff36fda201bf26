"""SwiGLU of rows sorted by expert, each with its expert's alphas, on every path."""

from collections.abc import Callable
from importlib import import_module
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
from sdd.kernels.experts import Order

# rows of each of up to four experts: many have none, and sometimes one has all
counts = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=4)
kinds = st.sampled_from(["plain", "normed", "joint", "bare"])


def normed(z: Tensor, alpha: Tensor | None, order: Order, eps: float) -> Tensor:
    return z if alpha is None else alpha[order.experts_M] * sdd_F.norm(z, eps)


def reference(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    order: Order,
    joint: bool = False,
    eps: float = 0.0,
    up_eps: float = 0.0,
) -> Tensor:
    """By gathering each row's alphas; autograd does the rest."""
    if joint:
        n_gate, n_up = sdd_F.norm(torch.cat([z_gate, z_up], -1), eps).chunk(2, -1)
        assert alpha_gate is not None
        assert alpha_up is not None
        return sdd_F.swiglu(alpha_gate[order.experts_M] * n_gate, alpha_up[order.experts_M] * n_up)
    return sdd_F.swiglu(normed(z_gate, alpha_gate, order, eps), normed(z_up, alpha_up, order, up_eps))


def bare_reference(
    z_gate: Tensor, z_up: Tensor, alpha_gate: Tensor | None, alpha_up: Tensor, order: Order, eps: float
) -> tuple[Tensor, Tensor]:
    h = sdd_F.swiglu(normed(z_gate, alpha_gate, order, eps), alpha_up[order.experts_M] * z_up)
    return h, z_up.square().mean(-1)


def arguments_of(
    rows: list[int], width: int, kind: str, gate: bool, activation: Callable[[int], Tensor], seed: int = 0
) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """The name of an operation, its reference, and what both take."""
    arguments: dict[str, Any] = {
        "z_gate": activation(0),
        "z_up": activation(1),
        "alpha_gate": drawn(seed + 2, len(rows), width) if gate or kind == "joint" else None,
        "alpha_up": drawn(seed + 3, len(rows), width) if kind != "plain" else None,
        "order": order_of(rows),
        "eps": 1e-3,
    }
    if kind == "bare":
        return "expert_swiglu_bare_up", bare_reference, arguments
    up_eps = {"joint": True, "up_eps": 1e-3} if kind == "joint" else {"up_eps": 1e-2}
    return "expert_swiglu", reference, arguments | up_eps


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=EXAMPLES)
@given(seeds, counts, st.integers(1, 40), st.booleans(), kinds, dtypes, layouts, layouts)
def test_values_and_gradients(path, seed, rows, width, gate, kind, dtype, layout, gradient_layout):
    def activation(i: int) -> Tensor:
        return drawn(seed + i, sum(rows), width, dtype=dtype, layout=layout)

    name, expected, arguments = arguments_of(rows, width, kind, gate, activation, seed)
    check(path, name, expected, arguments, seed + 4, gradient_layout, path == "recompute")


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("kind", ["normed", "joint", "bare"])
@pytest.mark.parametrize(
    "constants", ["common.COLUMN_BLOCK swiglu.MAX_PAIR swiglu.WIDE_BLOCK", "common.HELD_BLOCK common.LOOP_BLOCK"]
)
def test_rows_wider_than_a_program_holds(constants, kind, monkeypatch):
    for constant in constants.split():
        monkeypatch.setattr(f"sdd.kernels.fused.{constant}", 8)
    name, expected, arguments = arguments_of([3, 0, 1], 20, kind, True, lambda i: drawn(i, 4, 20))
    check("triton", name, expected, arguments, 9, "contiguous")


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("rows", [[0, 5, 0], [0, 0], [20, 1, 0, 7]], ids=str)
def test_sums_of_experts_without_rows_are_zero_and_bits_repeat(rows):
    name, _, arguments = arguments_of(rows, 8, "normed", True, lambda i: drawn(i, sum(rows), 8))
    leaves = [value.requires_grad_() for value in arguments.values() if isinstance(value, Tensor)]

    def once() -> tuple[Tensor, ...]:
        with kernels.use("triton"):
            return torch.autograd.grad(getattr(kernels, name)(**arguments).square().sum(), leaves)

    first, second = once(), once()
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for dalpha in first[2:]:
        assert (dalpha.abs().sum(1) > 0).tolist() == [count > 0 for count in rows]


@pytest.mark.parametrize("path", PATHS)
def test_what_does_not_fit_is_said(path):
    name, _, arguments = arguments_of([2, 1], 4, "normed", True, lambda i: drawn(i, 3, 4))
    for wrong in ({"alpha_up": drawn(0, 3, 4)}, {"alpha_gate": drawn(0, 4)}, {"order": order_of([2, 2])}):
        with kernels.use(path), pytest.raises(ValueError, match=r"expected|order of 4"):
            getattr(kernels, name)(**arguments | wrong)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("kind", ["normed", "bare"])
def test_opcheck(kind, monkeypatch):
    """Schema, fake tensors, autograd registration and AOT dispatch of the very calls that it makes."""
    module, calls = import_module("sdd.kernels.fused.swiglu"), []
    for attribute in ("swiglu_op", "swiglu_backward_op"):
        operation = getattr(module, attribute)

        def recorded(*args: Any, operation: Any = operation) -> Any:
            calls.append((operation, args))
            return operation(*args)

        monkeypatch.setattr(module, attribute, recorded)
    name, _, arguments = arguments_of([2, 0, 1], 8, kind, True, lambda i: drawn(i, 3, 8).requires_grad_())
    with kernels.use("triton"):
        found = getattr(kernels, name)(**arguments)
        sum(y.sum() for y in ((found,) if isinstance(found, Tensor) else found)).backward()
    assert len(calls) == 2
    for operation, args in tuple(calls):  # what opcheck itself calls is recorded too
        if operation is calls[1][0]:  # a backward pass, which has none itself
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        torch.library.opcheck(operation, args)
