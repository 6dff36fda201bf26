"""The operations on tensors without data, by which `sdd plan` measures a model for a GPU that is not here."""

from importlib import import_module
from typing import Any

import pytest
import torch
from helpers_kernels import drawn
from helpers_operations import OPERATIONS, arguments_of, order_of, outputs_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
EXPERTS = ["expert_scaled_norm", "expert_swiglu", "expert_swiglu_bare_up"]


def expert_arguments(name: str) -> dict[str, Any]:
    order = order_of([2, 0, 2])
    if name == "expert_scaled_norm":
        z, weights = drawn(0, 4, 8).requires_grad_(), drawn(2, 4).requires_grad_()
        return {"z": z, "alpha": drawn(1, 3, 8), "order": order, "weights": weights}
    arguments = {name: drawn(i, 4, 8).requires_grad_() for i, name in enumerate(("z_gate", "z_up"))}
    return arguments | {name: drawn(i, 3, 8) for i, name in enumerate(("alpha_gate", "alpha_up"))} | {"order": order}


def forward_and_backward(function: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The outputs of a call by the kernels, and the gradients of its activations."""
    with kernels.use("triton"):
        y = outputs_of(getattr(kernels, function)(**arguments))
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    return [*y, *torch.autograd.grad(y, leaves, [torch.ones_like(part) for part in y])]


@pytest.mark.parametrize("name", [*OPERATIONS, *EXPERTS])
def test_fake_tensors_give_the_layouts_of_real_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in EXPERTS:
        function, arguments = name, expert_arguments(name)
    else:
        function, arguments = arguments_of(name, 8, lambda i: drawn(i, 2, 8, dtype=torch.bfloat16).requires_grad_())
    real = forward_and_backward(function, arguments)
    monkeypatch.setattr(import_module("sdd.kernels.fused.common"), "INTERPRETED", False)
    with FakeTensorMode() as mode:
        fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        fake = forward_and_backward(function, fakes)
    layouts = [[(x.shape, x.stride(), x.dtype, x.device) for x in found] for found in (real, fake)]
    assert layouts[0] == layouts[1]
