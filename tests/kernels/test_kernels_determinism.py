"""The same numbers give the same bits: whatever the order in which programs run, and in a whole training step."""

import random
from functools import cache

import pytest
import torch
from helpers_kernels import DEVICE, HAS_TRITON, drawn, run
from helpers_operations import every_call, order_of, outputs_of
from torch import Tensor

from sdd import kernels
from sdd.models import LanguageModel, ModelConfig, MoEConfig
from sdd.placement import placements

PATHS: list[kernels.Path] = ["composed", "recompute", *(["triton"] if HAS_TRITON else [])]
CALLS = every_call(24)
ONE_OF_EACH = {function: name for name, (function, _) in CALLS.items()}.values()
MODEL = ModelConfig(
    n_layers=1, d_model=16, d_ff=24, n_heads=4, n_kv_heads=2, vocab_size=32, context=12,
    placement=placements["sdd-paper"], moe=MoEConfig(4, 2, d_shared=8),
)  # fmt: skip


def in_drawn_order(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Run the programs of every interpreted kernel in another order."""
    from triton.runtime.interpreter import InterpreterBuilder

    set_index = InterpreterBuilder.set_grid_idx

    @cache
    def places(n: int) -> list[int]:
        return random.Random(seed + n).sample(range(n), n)

    def set_other_index(builder: InterpreterBuilder, *index: int) -> None:
        set_index(builder, *(places(n)[i] for i, n in zip(index, builder.grid_dim, strict=True)))

    patch.setattr(InterpreterBuilder, "set_grid_idx", set_other_index)


def results(name: str) -> list[Tensor]:
    function, arguments = CALLS[name]
    with kernels.use("composed"):
        outputs = outputs_of(getattr(kernels, function)(**arguments))
    gradients = [drawn(i, *y.shape, dtype=y.dtype) for i, y in enumerate(outputs)]
    with kernels.use("triton"):
        return run(getattr(kernels, function), arguments, gradients)


@pytest.mark.skipif(not HAS_TRITON or DEVICE == "cuda", reason="no interpreter")
@pytest.mark.usefixtures("_one_block_and_several")
def test_the_order_of_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: results(name) for name in ONE_OF_EACH}
    in_drawn_order(monkeypatch, seed=0)
    for name, expected in before.items():
        for one, other in zip(results(name), expected, strict=True):
            assert torch.equal(one, other), name


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_sums_over_many_rows_of_an_expert_repeat() -> None:
    """More rows than programs, so that each sums several."""
    order = order_of([20, 1, 0, 7])
    z, alpha, weights, dy = drawn(0, 28, 8), drawn(1, 4, 8), drawn(2, 28), drawn(3, 28, 8)
    arguments = {"z": z, "alpha": alpha, "order": order, "weights": weights}
    with kernels.use("triton"):
        one, other = (run(kernels.expert_scaled_norm, arguments, [dy]) for _ in range(2))
    assert all(map(torch.equal, one, other))


def loss_and_gradients(path: kernels.Path) -> list[Tensor]:
    torch.manual_seed(0)
    model = LanguageModel(MODEL, DEVICE)
    tokens = torch.randint(0, 32, (1, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with kernels.use(path):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("path", PATHS)
def test_a_mixture_trains_under_deterministic_algorithms(path: kernels.Path) -> None:
    one, other = loss_and_gradients(path), loss_and_gradients(path)
    assert len(one) > 10
    assert all(map(torch.equal, one, other))
    torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, one, loss_and_gradients(path)))
