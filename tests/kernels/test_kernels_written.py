"""Fused operations return no memory that they have not written: with every new tensor filled with NaN, none is left."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from helpers_kernels import DEVICE, drawn, run
from helpers_operations import OPERATIONS, arguments_of, outputs_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON
from sdd.kernels.experts import sort_by_expert

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
WIDTH = 24
SMALL = {"MAX_BLOCK": 16, "MAX_FUSED": 16, "MAX_PAIR": 16, "WIDE_BLOCK": 8, "COLUMN_BLOCK": 8}
IN_TURN = {"HELD_BLOCK": 8, "LOOP_BLOCK": 8}


class FindUnwritten(TorchDispatchMode):
    """Records each fused operation that runs, and those with a NaN in an output, by number of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.unwritten: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == "sdd":
            name = func._schema.name
            self.seen.append(name)
            self.unwritten += [(name, i) for i, x in enumerate(outputs_of(outputs)) if x.isnan().any()]
        return outputs


@pytest.fixture
def _filled() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[{}, IN_TURN, SMALL], ids=["one block", "blocks in turn", "several blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("common", "scaled_norm_kernels", "swiglu", "residual_norm", "qk_norm_rope"):
        for constant, value in request.param.items():
            monkeypatch.setattr(f"sdd.kernels.fused.{module}.{constant}", value, raising=False)


def calls() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every operation, and every kind of gate and up projection, of a block and of experts of which one has no rows."""
    found = {name: arguments_of(name, WIDTH, lambda i: drawn(i, 2, WIDTH)) for name in OPERATIONS}
    shared = {"z_gate": drawn(0, 2, WIDTH), "z_up": drawn(1, 2, WIDTH)}
    order = sort_by_expert(torch.tensor([[0], [2]], device=DEVICE), 3)
    for name, shape, others in (("sdd_swiglu", (WIDTH,), {}), ("expert_swiglu", (3, WIDTH), {"order": order})):
        gate, up = {"alpha_gate": drawn(2, *shape)}, {"alpha_up": drawn(3, *shape)}
        no_gate, no_up = {"alpha_gate": None}, {"alpha_up": None}
        for label, alphas in {
            "both": gate | up,
            "gate": gate | no_up,
            "up": no_gate | up,
            "none": no_gate | no_up,
        }.items():
            found[f"{name}, {label}"] = name, shared | alphas | others
        found[f"{name}, joint"] = name, shared | gate | up | others | {"joint": True}
        for label, alphas in {"bare up": no_gate | up, "gate, bare up": gate | up}.items():
            found[f"{name}, {label}"] = f"{name}_bare_up", shared | alphas | others
    return found


CALLS = calls() if HAS_TRITON else {}


@pytest.mark.usefixtures("_filled", "_blocks")
@pytest.mark.parametrize("name", CALLS)
def test_no_output_is_unwritten(name: str) -> None:
    function, arguments = CALLS[name]
    operation = getattr(kernels, function)
    with kernels.use("triton"), FindUnwritten() as mode:
        with torch.no_grad():
            outputs = outputs_of(operation(**arguments))
        gradients = [drawn(i, *y.shape, dtype=y.dtype) for i, y in enumerate(outputs)]
        results = run(operation, arguments, gradients)
    assert any(name.endswith("_backward") for name in mode.seen)
    assert mode.unwritten == []
    assert not any(result.isnan().any() for result in results)


@pytest.mark.usefixtures("_filled")
def test_an_unwritten_output_is_found() -> None:
    """The mode sees what an operation returns, forward and backward."""
    common = import_module("sdd.kernels.fused.common")

    def empty(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    @common.launched_as("test_half_written", empty)
    def half_written(outputs: tuple[Tensor, ...], x: Tensor) -> None:
        outputs[0].copy_(x)

    with FindUnwritten() as mode:
        half_written(torch.ones(3))
    assert mode.unwritten == [("sdd::test_half_written", 1)]


@pytest.mark.parametrize("name", ["residual_postnorm", "residual_prenorm"])
def test_an_eps_without_a_norm_gets_no_gradient(name: str) -> None:
    z, residual = drawn(0, 2, WIDTH).requires_grad_(), drawn(1, 2, WIDTH)
    eps = drawn(2, 2).square().requires_grad_()
    with kernels.use("triton"):
        y = outputs_of(getattr(kernels, name)(z, residual, None, drawn(3, WIDTH), eps=eps))[1]
        dz, deps = torch.autograd.grad(y.sum(), [z, eps], allow_unused=True)
    assert dz is not None
    assert deps is None
