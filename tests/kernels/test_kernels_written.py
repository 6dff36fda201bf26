"""Fused operations return no memory that they have not written: with every new tensor filled with NaN, none is left."""

from importlib import import_module
from typing import Any

import pytest
import torch
from helpers_kernels import drawn, run
from helpers_operations import every_call, outputs_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
WIDTH = 24


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


CALLS = every_call(WIDTH)


@pytest.mark.usefixtures("_deterministic", "_one_block_and_several")
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


@pytest.mark.usefixtures("_deterministic")
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
