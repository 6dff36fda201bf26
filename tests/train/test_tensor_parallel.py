"""Runs whose processes share each matrix: losses, gradients, checkpoints."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_parallel import in_world
from helpers_train import TINY, rows

from sdd.files import read_json_lines
from sdd.parallel import ParallelConfig
from sdd.placement import Norm, placements
from sdd.train.optim import optimizer_tensors
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, reopen, start

# widths that 2 and 4 divide and 8 does not, four heads that share keys in pairs, and a batch that clips
CONFIG = replace(
    TINY,
    model=replace(TINY.model, d_ff=52, n_heads=4, n_kv_heads=2, vocab_size=4099),
    data=replace(TINY.data, batch_size=8),
    optim=replace(TINY.optim, grad_clip=0.5),
    accumulate=2,
)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def of_placement(name, **changes):
    return replace(CONFIG, model=replace(CONFIG.model, placement=placements[name]), **changes)


def gradients(world, configs, dtypes, out):
    """Of each config and in each precision: held-out loss, loss and gradients of a step."""
    found = {}
    for name, config in configs.items():
        for dtype in dtypes:
            trainer = Trainer(config, RunDir(out), world=world)
            trainer.model.to(dtype)
            found[name, dtype, "held-out loss"] = trainer.evaluate().loss
            found[name, dtype, "loss"] = trainer.backward(0).item()
            for key, parameter in trainer.model.named_parameters():
                assert parameter.dtype == dtype
                found[name, dtype, key] = whole(parameter.grad).numpy()
    return found


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
        assert ours.keys() == alone.keys()
        for (name, dtype, what), value in alone.items():
            expected, found = torch.as_tensor(value), torch.as_tensor(ours[name, dtype, what])
            rel = 1e-10 if dtype == torch.float64 and what != "loss" else 1e-5  # the loss of a step is float32
            assert (found - expected).norm() <= rel * expected.norm(), (name, dtype, what)


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
        assert ours.keys() == alone.keys()
        for (name, dtype, what), value in alone.items():
            expected, found = torch.as_tensor(value), torch.as_tensor(ours[name, dtype, what])
            rel = 1e-10 if what != "loss" else 1e-5  # the loss of a step is float32
            assert (found - expected).norm() <= rel * expected.norm(), (name, what)


# --- runs


def everything(trainer):
    """Parameters and optimiser state by name, whole."""
    named = {f"model.{name}": whole(parameter) for name, parameter in trainer.model.named_parameters()}
    state = {f"optimizer.{name}": whole(tensor) for name, tensor in optimizer_tensors(trainer.optimizer).items()}
    return {name: tensor.numpy() for name, tensor in (named | state).items()}


def train(world, config, out):
    trainer = start(config, out, world)
    trainer.run()
    return everything(trainer)


RUN = replace(CONFIG, steps=8, eval_every=4, checkpoint_every=4, eval_sequences=9, probe_every=4, sample_tokens=9)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that one process makes of RUN."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(World(), RUN, out)
    return out


def leaves(value, name=""):
    """The numbers in a row of the probe, by name."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in leaves(inner, f"{name}.{part}").items()}
    return {name: value}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_is_that_of_one_process(tmp_path, alone, name):
    size, layout, _ = LAYOUTS[name]
    in_world(size, train, replace(RUN, parallel=layout), tmp_path / "run")
    for ours, theirs in zip(rows(tmp_path / "run"), rows(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=5e-5, abs=1e-5), name
    samples = [json.loads((run / "samples.jsonl").read_text()) for run in (tmp_path / "run", alone)]
    assert samples[0] == samples[1], "text is written in one token at a time, which no processes share"
    ours, theirs = (list(read_json_lines(run / "probe.jsonl")) for run in (tmp_path / "run", alone))
    assert len(ours) == len(theirs) > 2
    for one, other in zip(map(leaves, ours), map(leaves, theirs), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-7), name


def stopped_and_resumed(world, config, out):
    """A run that is reopened at step 4, and what it has at the end."""
    trainer = start(config, out, world)
    while trainer.step < 4:
        trainer.train_step(trainer.step)
        trainer.step += 1
    trainer.save()
    trainer.run_dir.unlock()
    torch.manual_seed(7)
    again = reopen(out, world=world)
    assert again.step == 4
    while again.step < 8:
        again.train_step(again.step)
        again.step += 1
    again.run_dir.unlock()
    return everything(again)


def unbroken(world, config, out):
    trainer = Trainer(config, RunDir(out), world=world)
    for step in range(8):
        trainer.train_step(step)
    return everything(trainer)


def test_a_run_goes_on_bit_for_bit_within_a_layout(tmp_path):
    config = replace(RUN, parallel=ParallelConfig(tensor=2))
    ours = in_world(4, stopped_and_resumed, config, tmp_path / "run")
    theirs = in_world(4, unbroken, config, tmp_path)
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            assert np.array_equal(one[name], other[name]), name


def saved_by(world, config, out):
    trainer = start(config, out, world)
    for step in range(2):
        trainer.train_step(step)
        trainer.step += 1
    trainer.save()
    trainer.run_dir.unlock()
    return everything(trainer)


def loaded_and_saved(world, out, parallel):
    trainer = reopen(out, world=world, parallel=parallel)
    found = everything(trainer)
    trainer.train_step(trainer.step)
    trainer.step += 1
    trainer.save()
    trainer.run_dir.unlock()
    return found, everything(trainer)


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
