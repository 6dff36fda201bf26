"""A probe beside the training loop: on several processes, sharded, as on one."""

from dataclasses import replace

import pytest
from helpers_parallel import in_world
from helpers_train import TINY

import sdd
from sdd.train import loop
from sdd.train.parallel import World

# d_ff and the vocabulary divide by no number of processes; parts of one row, as attention is sampled of a part's first
CONFIG = replace(
    TINY,
    model=replace(TINY.model, d_ff=51, vocab_size=4097),
    data=replace(TINY.data, batch_size=4),
    accumulate=4,
)


def probed(world, config, out, name):
    """The rows that a probe finds in two steps of a placement, and what it writes."""
    config = replace(config, model=replace(config.model, placement=sdd.placements[name]))
    trainer = loop.Trainer(config, loop.RunDir(out), world=world)
    with sdd.Probe(trainer.model, trainer.optimizer, 1, out / f"{world.size}-{name}.jsonl") as probe:
        rows = []
        for step in range(2):
            trainer.train_step(step)
            rows.append(probe.latest)
    return rows


def assert_same(ours, theirs, rel):
    for row, other in zip(ours, theirs, strict=True):
        assert list(row["sites"]) == list(other["sites"])
        for site, stats in row["sites"].items():
            assert stats == pytest.approx(other["sites"][site], rel=rel), site
        for stat, values in row["layers"].items():
            assert values == pytest.approx(other["layers"][stat], rel=rel), stat


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sdd-released", {}), ("prenorm", {"activation_checkpointing": True}), ("sdd-paper", {"precision": "bfloat16"})],
)
def test_two_processes_find_what_one_finds(tmp_path, name, changes):
    config = replace(CONFIG, **changes)
    alone = probed(World(), config, tmp_path, name)
    found = in_world(2, probed, config, tmp_path, name)
    assert found[0] == found[1]
    assert_same(found[0], alone, rel=0.02 if changes.get("precision") else 5e-4)
    assert len((tmp_path / f"2-{name}.jsonl").read_text().splitlines()) == 2, "one process writes"
    assert {"update_ratio", "angle", "alpha_grad_rms"} <= {s for st in found[0][1]["sites"].values() for s in st}


def compiled(world, config, out, backend):
    trainer = loop.Trainer(config, loop.RunDir(out), world=world)
    if backend:
        for block in trainer.model.blocks:
            block.compile(backend=backend)
    rows = []
    with sdd.Probe(trainer.model, trainer.optimizer, 3, rows.append):
        losses = [trainer.train_step(step)[0].item() for step in range(3)]
    return losses, rows


@pytest.mark.slow
def test_compiled_and_checkpointed_blocks_on_two_processes(tmp_path):
    config = replace(CONFIG, model=replace(CONFIG.model, n_layers=1), accumulate=1)
    losses, rows = in_world(2, compiled, config, tmp_path, None)[0]
    config = replace(config, activation_checkpointing=True)
    fast_losses, fast_rows = in_world(2, compiled, config, tmp_path, "aot_eager")[0]
    assert fast_losses == pytest.approx(losses, abs=1e-5)
    assert [row["step"] for row in fast_rows] == [1, 3]
    assert_same(fast_rows, rows, rel=2e-3)
