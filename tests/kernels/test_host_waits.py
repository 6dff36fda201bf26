"""No operation and no training step waits for the device or has shapes that depend on numbers, but for those named."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_meta import HostWaits, launches_shown, on_meta
from helpers_operations import every_call, outputs_of
from torch import Tensor

from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON
from sdd.models import LanguageModel, ModelConfig, MoEConfig
from sdd.placement import placements
from sdd.train import OptimConfig
from sdd.train.optim import build_optimizer, clip_gradients

PATHS = ["composed", "recompute", *(["triton"] if HAS_TRITON else [])]
CALLS = every_call(24)
DENSE = ModelConfig(n_layers=2, d_model=16, d_ff=24, n_heads=4, n_kv_heads=2, vocab_size=32, context=12)
MODELS = {"dense": None, "experts": MoEConfig(4, 2, d_shared=8)}
#: What waits for the device in a training step, and why.
WAITS = {
    "sdd::expert_rows": "products of experts of unlike sizes, where torch.nn.functional.grouped_mm is not used: a loop",
    "sdd::expert_groups": "the same for the gradients of their matrices",
}


def step_of(name: str, path: kernels.Path) -> HostWaits:
    """What a whole training step of that model does: forward, backward, clipping, update."""
    mode = HostWaits(tuple(WAITS))
    config = replace(DENSE, moe=MODELS[name], placement=placements["sdd-paper"])
    model, tokens = LanguageModel(config, "meta"), torch.zeros(2, 13, dtype=torch.int64, device="meta")
    optimizer = build_optimizer(model, OptimConfig())
    with launches_shown(mode), kernels.use(path), mode:
        loss = model(tokens[:, :-1], tokens[:, 1:], z_loss=1e-4, detailed=True)
        loss.total.backward()
        clip_gradients(model, 1.0)
        optimizer.step()
    return mode


@pytest.mark.usefixtures("_one_block_and_several")
@pytest.mark.parametrize("path", PATHS)
def test_no_operation_waits_or_adds_in_no_order(path: kernels.Path) -> None:
    mode = HostWaits()
    with launches_shown(mode), kernels.use(path):
        for function, arguments in CALLS.values():
            given = on_meta(arguments)
            leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
            with mode:
                outputs = outputs_of(getattr(kernels, function)(**given))
                torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs], allow_unused=True)
    assert ("sdd::swiglu_backward" in mode.seen) == (path == "triton")
    assert mode.waits == []
    assert mode.unordered == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_waits_only_where_it_is_known_to(name: str, path: kernels.Path) -> None:
    mode = step_of(name, path)
    assert set(mode.waits) == (set(WAITS) if name == "experts" else set())
    assert mode.unordered == []


#: Operations that wait, and run on the meta device all the same.
RUN: dict[str, Any] = {
    "tensor": lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "aten::_to_copy": lambda x: x + torch.ones(2).to(x.device),
    "aten::copy_": lambda x: x.copy_(torch.ones(2)),
}
#: Operations whose results the meta device cannot know.
REFUSED: dict[str, Any] = {
    "aten::_local_scalar_dense": lambda x: x.sum().item(),
    "aten::nonzero": lambda x: x.nonzero(),
    "aten::masked_select": lambda x: x.masked_select(x > 0),
}


@pytest.mark.parametrize("name", RUN)
def test_a_copy_from_the_host_is_found(name: str) -> None:
    with HostWaits() as mode:
        RUN[name](torch.ones(2, device="meta"))
    assert mode.waits == [name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_result_that_the_host_must_know_is_found(name: str) -> None:
    with HostWaits() as mode, pytest.raises((RuntimeError, NotImplementedError)):
        REFUSED[name](torch.ones(2, device="meta"))
    assert mode.waits == [name]


def test_additions_without_an_order_are_found() -> None:
    rows, places = torch.ones(3, 2, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    with HostWaits() as mode:
        rows.new_zeros(2, 2).index_add_(0, places, rows)
        rows.new_zeros(2, 2).index_put_((places,), rows, accumulate=True)
    assert len(mode.unordered) == 2
