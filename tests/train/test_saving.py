"""Checkpoints written beside the training: the same files, one at a time, and no failure is lost."""

import errno
import json
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers_parallel import in_world
from helpers_train import TINY, UNEVEN, assert_same_tensors, rows

from sdd.errors import Interrupted, RunFailed
from sdd.parallel import ParallelConfig
from sdd.train import checkpoint as ckpt
from sdd.train.checkpoint import half_written, list_checkpoints
from sdd.train.parallel import World
from sdd.train.trainer import start

ASIDE = replace(TINY, checkpoint_async=True)


def contents(path):
    """Every byte of a checkpoint, but for the order of a file's notes, which safetensors draws anew for each file."""
    found = {}
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        found[file.name] = json.loads(data[8:size]), data[size:]
    state = ckpt.read_state(path)
    files = {name: file["size"] for name, file in state["files"].items()}
    return found | {"state": {**state, "files": files, "sha256": None}}


def slowed(monkeypatch, seconds, times=None):
    """Every checkpoint takes that much longer to be written."""
    write = ckpt.write_checkpoint

    def slow(*args):
        began = time.monotonic()
        time.sleep(seconds)
        path = write(*args)
        if times is not None:
            times.append((began, time.monotonic()))
        return path

    monkeypatch.setattr(ckpt, "write_checkpoint", slow)


def both(world, config, out):
    """A checkpoint's files, written at once, and written beside a step that is taken meanwhile."""
    trainer = start(config, out, world)
    for step in range(2):
        trainer.train_step(step)
        trainer.step += 1
    path = trainer.save()
    world.on_main(lambda: path.rename(out / "at-once"))
    go, write = threading.Event(), ckpt.write_checkpoint
    ckpt.write_checkpoint = lambda *args: go.wait(30) and write(*args)
    try:
        trainer.save_beside()
        trainer.train_step(2)
        go.set()
        trainer.saver.finish()
    finally:
        ckpt.write_checkpoint = write
    trainer.run_dir.unlock()
    return contents(out / "at-once"), contents(path)


def test_the_bytes_are_those_of_the_step_whatever_is_trained_meanwhile(tmp_path):
    one, other = both(World(), ASIDE, tmp_path / "run")
    assert one == other
    assert len(one) == 2


@pytest.mark.parametrize(("size", "parallel"), [(2, ParallelConfig()), (4, ParallelConfig(tensor=2))])
def test_the_bytes_are_the_same_where_processes_share_the_model(tmp_path, size, parallel):
    model = replace(UNEVEN.model, d_ff=52, n_heads=4, n_kv_heads=2)
    config = replace(UNEVEN, model=model, checkpoint_async=True, parallel=parallel)
    for one, other in in_world(size, both, config, tmp_path / "run"):
        assert one == other


def test_a_run_is_the_same_and_at_its_end_every_checkpoint_is_whole(tmp_path, monkeypatch):
    start(TINY, tmp_path / "waits").run()
    slowed(monkeypatch, 0.2)
    start(ASIDE, tmp_path / "goes-on").run()
    assert rows(tmp_path / "waits") == rows(tmp_path / "goes-on")
    ours, theirs = (list_checkpoints(tmp_path / run / "checkpoints") for run in ("goes-on", "waits"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for one, other in zip(ours, theirs, strict=True):
        ckpt.verify(one, ckpt.read_state(one))
        assert_same_tensors(one, other)


def test_one_checkpoint_is_written_at_a_time(tmp_path, monkeypatch):
    times = []
    slowed(monkeypatch, 0.05, times)
    start(replace(ASIDE, checkpoint_every=1, steps=5, eval_every=0), tmp_path / "run").run()
    assert len(times) == 5
    assert all(end <= begin for (_, end), (begin, _) in pairwise(times))


def at_batch(trainer, step, do):
    """Do something before the batch of a step (from 0) is read."""
    read = trainer.loader.batch
    trainer.loader.batch = lambda index: (do() if index == step else None, read(index))[1]


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    slowed(monkeypatch, 0.3)
    trainer = start(ASIDE, tmp_path / "run")
    at_batch(trainer, 4, lambda: setattr(trainer._signals, "received", True))
    with pytest.raises(Interrupted, match="step 5"):
        trainer.run()
    found = list_checkpoints(trainer.run_dir.checkpoints)
    assert [path.name for path in found] == ["step-00000004", "step-00000005"]


def test_a_rollback_goes_to_the_checkpoint_that_is_still_being_written(tmp_path, monkeypatch, capsys):
    trainer = start(ASIDE, tmp_path / "run")
    trainer.train_step(0)
    trainer.step = 1
    slowed(monkeypatch, 0.3)
    trainer.save_beside()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train_step(1)
    trainer.resume_newest()
    trainer.run_dir.unlock()
    assert trainer.step == 1
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    assert "half-written" not in capsys.readouterr().err


def test_while_one_is_written_the_old_one_is_there_and_no_half_one(tmp_path):
    trainer = start(replace(ASIDE, keep_checkpoints=1), tmp_path / "run")
    trainer.save()
    trainer.step = 1
    there, go, complete = threading.Event(), threading.Event(), ckpt._complete

    def held(*args):
        there.set()
        go.wait(30)
        complete(*args)

    ckpt._complete = held
    try:
        trainer.save_beside()
        assert there.wait(30)
        seen = [path.name for path in list_checkpoints(trainer.run_dir.checkpoints)]
        assert half_written(trainer.run_dir.checkpoints), "a process killed now leaves this"
        go.set()
        trainer.saver.finish()
    finally:
        ckpt._complete = complete
    trainer.run_dir.unlock()
    assert seen == ["step-00000000"]
    assert [path.name for path in trainer.run_dir.checkpoints.iterdir()] == ["step-00000001"]


# --- disks that refuse


def refusing(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "the/file")


def failing_run(world, config, out, rank):
    """The message of a run of which one process meets a full disk at the checkpoint of step 4."""
    trainer = start(config, out, world)
    if world.rank == rank:
        ckpt._synced_digests = refusing
    at_batch(trainer, 4, lambda: trainer.saver._writing.exception())  # the thread is done: step 5 must tell
    try:
        with pytest.raises(RunFailed) as caught:
            trainer.run()
    finally:
        trainer.run_dir.unlock()
    return str(caught.value)


def test_a_write_that_failed_ends_the_run_at_the_next_step_as_one_that_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "_synced_digests", ckpt._synced_digests)
    run = tmp_path / "run"
    message = failing_run(World(), replace(ASIDE, steps=8), run, 0)
    assert message == (
        "step 5: cannot write the/file: No space left on device; the last checkpoint is none; once that is mended: "
        f"sdd resume {run}"
    )
    assert list((run / "checkpoints").iterdir()) == []


def test_a_write_that_failed_in_one_process_ends_the_run_in_all(tmp_path):
    config = replace(UNEVEN, steps=8, checkpoint_every=4, checkpoint_async=True)
    messages = in_world(2, failing_run, config, tmp_path / "run", 1)
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 5: cannot write the/file: No space left on device")


def test_a_write_that_failed_is_said_where_something_else_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ckpt, "write_checkpoint", refusing)
    trainer = start(ASIDE, tmp_path / "run")
    trainer.save_beside()
    trainer.settle()
    trainer.run_dir.unlock()
    assert "a checkpoint could not be written" in capsys.readouterr().err
    trainer.saver.finish()
