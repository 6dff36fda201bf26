"""Runs whose processes share each matrix: losses, gradients, checkpoints."""

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
    leaves,
    loaded_and_saved,
    of_placement,
    saved_by,
    stopped_and_resumed,
    train,
    unbroken,
    whole,
)
from helpers_parallel import in_world

from sdd.files import read_json_lines
from sdd.parallel import ParallelConfig
from sdd.placement import Norm, placements
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer

pytestmark = pytest.mark.layouts

LAYOUTS = {
    "tensor 2": (2, ParallelConfig(tensor=2), list(placements)),
    "shard 2, tensor 2": (4, ParallelConfig(tensor=2), ["sdd", "sdd-paper", "sdd-released", "hybrid", "ngpt"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_placements_have_the_losses_and_gradients_of_one_process(tmp_path, name):
    size, layout, names = LAYOUTS[name]
    configs = {name: of_placement(name) for name in names}
    dtypes = [torch.float64] if size == 2 else [torch.float64, torch.float32]
    alone = gradients(World(), configs, dtypes, tmp_path)
    shared = {name: replace(config, parallel=layout) for name, config in configs.items()}
    for ours in in_world(size, gradients, shared, dtypes, tmp_path):
        assert_same_gradients(ours, alone)


SDD = placements["sdd"]
LOSSES = {
    "z-loss": replace(CONFIG, optim=replace(CONFIG.optim, z_loss=1e-2)),
    "tied embeddings": replace(CONFIG, model=replace(CONFIG.model, tie_embeddings=True)),
    "chunked loss": replace(CONFIG, chunked_loss=True),
    "tied embeddings, chunked loss": replace(
        CONFIG, model=replace(CONFIG.model, tie_embeddings=True), chunked_loss=True
    ),
    "scaled logits, z-loss": of_placement("ngpt", optim=replace(CONFIG.optim, z_loss=1e-2)),
    "norm of embeddings": replace(
        CONFIG,
        model=replace(CONFIG.model, placement=replace(SDD, name=None, norms={**SDD.norms, "embed": Norm()})),
    ),
    "recomputed blocks": replace(CONFIG, activation_checkpointing=True),
    "masked documents": replace(CONFIG, data=replace(CONFIG.data, document_mask=True)),
}


def test_every_kind_of_loss_is_that_of_one_process(tmp_path):
    alone = gradients(World(), LOSSES, [torch.float64], tmp_path)
    shared = {name: replace(config, parallel=ParallelConfig(tensor=2)) for name, config in LOSSES.items()}
    for ours in in_world(2, gradients, shared, [torch.float64], tmp_path):
        assert_same_gradients(ours, alone)


# --- runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that one process makes of RUN."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(World(), RUN, out)
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_is_that_of_one_process(tmp_path, alone, name):
    size, layout, _ = LAYOUTS[name]
    in_world(size, train, replace(RUN, parallel=layout), tmp_path / "run")
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("name", ["sdd-paper", "sdd-released"])
def test_eps_is_weighed_against_all_features_of_a_norm(tmp_path, name):
    """The probe's ratios of norms over features of several processes are those of one process."""
    config = of_placement(name, steps=2, probe_every=1, eval_every=0, sample_tokens=0)
    train(World(), config, tmp_path / "alone")
    in_world(2, train, replace(config, parallel=ParallelConfig(tensor=2)), tmp_path / "run")
    ours, theirs = (
        {key: value for row in read_json_lines(tmp_path / run / "probe.jsonl") for key, value in leaves(row).items()}
        for run in ("run", "alone")
    )
    ratios = {key for key in theirs if "eps_ratio" in key}
    assert any("up_proj" in key for key in ratios)
    for key in ratios:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_a_run_goes_on_bit_for_bit_within_a_layout(tmp_path):
    config = replace(RUN, parallel=ParallelConfig(tensor=2))
    ours = in_world(4, stopped_and_resumed, config, tmp_path / "run")
    theirs = in_world(4, unbroken, config, tmp_path)
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            assert np.array_equal(one[name], other[name]), name


def test_checkpoints_load_in_every_layout_bit_for_bit(tmp_path):
    out = tmp_path / "run"
    before = in_world(4, saved_by, replace(RUN, parallel=ParallelConfig(tensor=2)), out)[0]
    for size, parallel in (
        (2, {"parallel.tensor": "2"}),
        (1, {"parallel.tensor": "1"}),
        (4, {"parallel.tensor": "2", "parallel.replicate": "2"}),
        (4, {"parallel.tensor": "1"}),
        (4, {"parallel.tensor": "2", "parallel.replicate": "1"}),
    ):
        if size == 1:
            answers = [loaded_and_saved(World(), out, parallel)]
        else:
            answers = in_world(size, loaded_and_saved, out, parallel)
        for found, _ in answers:
            for name in before:
                assert np.array_equal(before[name], found[name]), (size, parallel, name)
        before = answers[0][1]


def rules(world, out, parallel):
    """Two steps of every optimiser, under every rule for the lengths of weights."""
    found = {}
    for name, placement, weights in (
        ("muon", "sdd", "free"),
        ("stable-adamw", "sdd-paper", "free"),
        ("adamw", "sdd", "rows"),
        ("adamw", "sdd", "hyperball"),
        ("adamw", "ngpt", "free"),
    ):
        config = of_placement(placement, optim=replace(CONFIG.optim, name=name, weights=weights), parallel=parallel)
        trainer = Trainer(config, RunDir(out), world=world)
        for step in range(2):
            trainer.train_step(step)
        values = {key: whole(p).numpy() for key, p in trainer.model.named_parameters()}
        found |= {f"{name} {placement} {weights}: {key}": value for key, value in values.items()}
    return found


def test_every_optimiser_moves_shared_matrices_as_whole_ones(tmp_path):
    alone = rules(World(), tmp_path, ParallelConfig())
    for ours in in_world(4, rules, tmp_path, ParallelConfig(tensor=2)):
        for name, value in alone.items():
            assert np.allclose(ours[name], value, rtol=1e-3, atol=2e-5), name
