"""Runs whose processes share each sequence: losses, gradients, checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_layouts import (
    CONFIG,
    RUN,
    assert_same_gradients,
    assert_same_run,
    gradients,
    loaded_and_saved,
    of_placement,
    saved_by,
    stopped_and_resumed,
    train,
    unbroken,
)
from helpers_parallel import in_world
from helpers_ring import on_cpu

from sdd.models import MoEConfig
from sdd.models.transformer import HAS_CHUNKED_LOSS
from sdd.parallel import ParallelConfig
from sdd.placement import placements
from sdd.train import learner
from sdd.train.parallel import World

pytestmark = pytest.mark.layouts

# auxiliary losses that are large enough to be seen; a pass is the whole batch, whose tokens f and P are of
MOE = replace(
    CONFIG,
    model=replace(CONFIG.model, d_ff=20, moe=MoEConfig(3, 2, d_shared=12, balance_loss=0.5, router_z_loss=0.1)),
    accumulate=1,
)
OTHERS = {
    "documents, z-loss, tied": replace(
        CONFIG,
        model=replace(CONFIG.model, tie_embeddings=True),
        data=replace(CONFIG.data, document_mask=True),
        optim=replace(CONFIG.optim, z_loss=1e-2),
    ),
    "chunked, recomputed": replace(CONFIG, chunked_loss=HAS_CHUNKED_LOSS, activation_checkpointing=True),
    "mixture": MOE,
    "mixture of documents": replace(
        MOE,
        model=replace(MOE.model, placement=placements["sdd-released"]),
        data=replace(MOE.data, document_mask=True),
    ),
}
DENSE = ("documents, z-loss, tied", "chunked, recomputed")  # mixtures are not cut by `tensor`
SOME = ("sdd", "sdd-released", "keel", "ngpt")

LAYOUTS = {
    "context 2": (2, ParallelConfig(context=2), [*placements], [*OTHERS]),
    "context 4": (4, ParallelConfig(context=4), SOME, [*OTHERS]),
    "context 2, tensor 2": (4, ParallelConfig(context=2, tensor=2), SOME, DENSE),
    "shard 2, context 2": (4, ParallelConfig(context=2), SOME, [*OTHERS]),
    "replicate 2, context 2": (4, ParallelConfig(context=2, replicate=2), SOME[:1], [*OTHERS]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_models_have_the_losses_and_gradients_of_one_process(tmp_path, name):
    size, layout, names, others = LAYOUTS[name]
    configs = {name: of_placement(name) for name in names} | {name: OTHERS[name] for name in others}
    dtypes = [torch.float64] if size == 2 else [torch.float64, torch.float32]
    alone = gradients(World(), configs, dtypes, tmp_path)
    shared = {name: replace(config, parallel=layout) for name, config in configs.items()}
    for ours in in_world(size, gradients, shared, dtypes, tmp_path):
        assert_same_gradients(ours, alone)


# --- torch's ring, with the kernel of CPUs


def by_ring(world, function, *args):
    """`function(world, *args)` where this machine passes for one that has the ring."""
    calls = on_cpu()
    learner.check_ring = lambda *_: None
    answer = function(world, *args)
    assert calls
    return answer


def ring(config):
    return replace(config, parallel=ParallelConfig(context=2, context_attention="ring"))


@pytest.mark.parametrize("name", ["sdd", "recomputed"])
def test_by_ring_a_model_has_the_losses_and_gradients_of_one_process(tmp_path, name):
    configs = {name: OTHERS["chunked, recomputed"] if name == "recomputed" else of_placement(name)}
    alone = gradients(World(), configs, [torch.float32], tmp_path)
    shared = {name: ring(config) for name, config in configs.items()}
    for ours in in_world(2, by_ring, gradients, shared, [torch.float32], tmp_path):
        assert_same_gradients(ours, alone)


def test_by_ring_a_run_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(AssertionError, match="context_attention=ring runs on CUDA GPUs alone, and this run is on cpu"):
        in_world(2, train, ring(RUN), tmp_path / "run")


RUNS = {
    "dense": replace(RUN, data=replace(RUN.data, document_mask=True)),
    # no more sequences than the probe looks at
    "mixture": replace(RUN, model=MOE.model, accumulate=1, data=replace(RUN.data, batch_size=4)),
}


@pytest.mark.parametrize(
    ("kind", "size", "layout"),
    [
        ("dense", 2, ParallelConfig(context=2)),
        ("dense", 4, ParallelConfig(context=2, tensor=2)),
        ("mixture", 4, ParallelConfig(context=2)),
    ],
)
def test_a_run_is_that_of_one_process(tmp_path, kind, size, layout):
    train(World(), RUNS[kind], tmp_path / "alone")
    in_world(size, train, replace(RUNS[kind], parallel=layout), tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def resumed_and_unbroken(world, config, out):
    return stopped_and_resumed(world, config, out / "run"), unbroken(world, config, out)


@pytest.mark.parametrize(
    ("kind", "size", "layout"),
    [("dense", 4, ParallelConfig(context=2, tensor=2)), ("mixture", 2, ParallelConfig(context=2))],
)
def test_a_run_goes_on_bit_for_bit_within_a_layout(tmp_path, kind, size, layout):
    config = replace(RUNS[kind], parallel=layout)
    for ours, theirs in in_world(size, resumed_and_unbroken, config, tmp_path):
        for name in ours:
            assert np.array_equal(ours[name], theirs[name]), name


def test_checkpoints_load_in_every_layout_bit_for_bit(tmp_path):
    out = tmp_path / "run"
    before = in_world(2, saved_by, replace(RUN, parallel=ParallelConfig(context=2)), out)[0]
    for size, parallel in (
        (4, {"parallel.context": "2", "parallel.tensor": "2"}),
        (1, {"parallel.context": "1", "parallel.tensor": "1"}),
        (4, {"parallel.context": "2", "parallel.replicate": "2"}),
        (2, {"parallel.context": "1", "parallel.replicate": "1"}),
    ):
        in_one = size == 1
        answers = (
            [loaded_and_saved(World(), out, parallel)] if in_one else in_world(size, loaded_and_saved, out, parallel)
        )
        for found, _ in answers:
            for name in before:
                assert np.array_equal(before[name], found[name]), (size, parallel, name)
        before = answers[0][1]
