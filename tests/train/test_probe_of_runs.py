"""A probe in and beside the training loop: on several processes, sharded, as on one."""

import json
from dataclasses import replace

import pytest
import torch
from helpers_parallel import in_world
from helpers_train import TINY, rows

import sdd
from sdd.models import LanguageModel
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, reopen, start

# d_ff and the vocabulary divide by no number of processes; parts of one row, as attention is sampled of a part's first
CONFIG = replace(
    TINY,
    model=replace(TINY.model, d_ff=51, vocab_size=4097),
    data=replace(TINY.data, batch_size=4),
    accumulate=4,
    probe_every=0,
)


def probed(world, config, out, name):
    """The rows that a probe finds in two steps of a placement, and what it writes."""
    config = replace(config, model=replace(config.model, placement=sdd.placements[name]))
    trainer = Trainer(config, RunDir(out), world=world)
    with sdd.Probe(trainer.model, trainer.optimizer, 1, out / f"{world.size}-{name}.jsonl") as probe:
        found = []
        for step in range(2):
            trainer.train_step(step)
            found.append(probe.latest)
    return found


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


def replicated(world, tokens):
    """The rows of two steps, under DistributedDataParallel if there are several processes."""
    torch.manual_seed(0)
    model = LanguageModel(replace(TINY.model, n_layers=1))
    trained = torch.nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    mine = tokens.chunk(world.size)[world.rank]
    found = []
    with sdd.Probe(trained, optimizer, 1) as probe:
        for _ in range(2):
            for part in mine.split(1):  # one row a pass, as attention is sampled of a pass's first
                (trained(part[:, :-1], part[:, 1:]) / len(mine)).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(probe.latest)
    return found


def test_replicas_find_what_one_process_finds():
    tokens = torch.randint(4096, (4, 17), generator=torch.Generator().manual_seed(0))
    found = in_world(2, replicated, tokens)
    assert found[0] == found[1]
    assert_same(found[0], replicated(World(), tokens), rel=5e-4)


def compiled(world, config, out, backend):
    trainer = Trainer(config, RunDir(out), world=world)
    if backend:
        for block in trainer.model.blocks:
            block.compile(backend=backend)
    found = []
    with sdd.Probe(trainer.model, trainer.optimizer, 3, found.append):
        losses = [trainer.train_step(step)[0].item() for step in range(3)]
    return losses, found


@pytest.mark.slow
def test_compiled_and_checkpointed_blocks_on_two_processes(tmp_path):
    config = replace(CONFIG, model=replace(CONFIG.model, n_layers=1), accumulate=1)
    losses, plain = in_world(2, compiled, config, tmp_path, None)[0]
    config = replace(config, activation_checkpointing=True)
    fast_losses, fast_rows = in_world(2, compiled, config, tmp_path, "aot_eager")[0]
    assert fast_losses == pytest.approx(losses, abs=1e-5)
    assert [row["step"] for row in fast_rows] == [1, 3]
    assert_same(fast_rows, plain, rel=2e-3)


# --- runs


def probe_rows(run):
    return [json.loads(line) for line in (run / "probe.jsonl").read_text().splitlines()]


def test_a_run_is_probed_and_not_changed_by_it(tmp_path):
    for every in (0, 5):
        start(replace(TINY, probe_every=every), tmp_path / str(every)).run()
    assert rows(tmp_path / "0") == rows(tmp_path / "5")
    assert not (tmp_path / "0" / "probe.jsonl").exists()
    assert [row["step"] for row in probe_rows(tmp_path / "5")] == [1, 2, 4, 5, 10]


def test_a_resumed_run_is_probed_as_an_uninterrupted_one(tmp_path):
    config = replace(TINY, probe_every=3)
    start(config, tmp_path / "whole").run()
    trainer = start(config, tmp_path / "cut")
    while trainer.step < 7:  # as a killed process leaves it: a checkpoint at 4, a probed step after it
        trainer._take_step()
        if trainer.step == 4:
            trainer.save()
    trainer.run_dir.unlock()
    assert [row["step"] for row in probe_rows(tmp_path / "cut")] == [1, 2, 3, 6]
    reopen(tmp_path / "cut").run()
    assert probe_rows(tmp_path / "cut") == probe_rows(tmp_path / "whole")


def test_gradients_are_those_before_clipping(tmp_path):
    found = []
    for limit in (0.0, 1e-3):
        out = tmp_path / str(limit)
        trainer = start(replace(TINY, optim=replace(TINY.optim, grad_clip=limit)), out)
        trainer._take_step()
        trainer.run_dir.unlock()
        (row,) = probe_rows(out)
        found.append({site: stats.get("weight_grad_rms") for site, stats in row["sites"].items()})
    assert found[0] == found[1]


def whole_run(world, config, out):
    start(config, out, world).run()


def test_two_processes_write_what_one_writes(tmp_path):
    config = replace(CONFIG, probe_every=2, steps=2)
    whole_run(World(), config, tmp_path / "1")
    in_world(2, whole_run, config, tmp_path / "2")
    assert_same(probe_rows(tmp_path / "2"), probe_rows(tmp_path / "1"), rel=5e-4)
