"""The command under torchrun itself: what happens when processes die, jobs are stopped, or the command is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_parallel import in_world
from helpers_train import TINY, rows

from sdd.train import config_io
from sdd.train.checkpoint import list_checkpoints
from sdd.train.trainer import reopen, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc")

CONFIG = replace(
    TINY,
    data=replace(TINY.data, batch_size=8),
    optim=replace(TINY.optim, schedule="constant"),
    accumulate=4,
    steps=1_000_000,
    eval_every=0,
    checkpoint_every=10,
    keep_checkpoints=2,
    sample_tokens=0,
    compile=False,  # a million steps would be compiled
)


@contextmanager
def torchrun(log, *words, options=()):
    """`torchrun OPTIONS -m sdd WORDS` on two processes; stopped with all its processes at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options, "-m", "sdd", *words]
    with log.open("w") as stream:
        job = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            yield job
        finally:
            if job.poll() is None:
                job.terminate()
            job.wait(60)


def worker(job, rank):
    """The process of that rank."""
    for found in Path("/proc").glob("[0-9]*"):
        try:
            parent = (found / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == job.pid and f"RANK={rank}" in (found / "environ").read_text().split("\0"):
                return int(found.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


def wait_for_step(job, run, log, step):
    """Until there is a checkpoint of that step or a later one."""
    end = time.monotonic() + 120
    while not any(int(path.name[5:]) >= step for path in list_checkpoints(run / "checkpoints")):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def newest(run):
    return int(list_checkpoints(run / "checkpoints")[-1].name[5:])


def train(world, config, out):
    start(config, out, world).run()


@pytest.mark.slow
def test_a_killed_rank_a_stopped_job_and_a_smaller_world_do_not_change_the_run(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    config_io.save(CONFIG, tmp_path / "config.json")
    words = ("train", str(tmp_path / "config.json"), "--out", str(run))
    with torchrun(log, *words, options=("--max-restarts", "1")) as job:
        wait_for_step(job, run, log, 10)
        os.kill(worker(job, 1), signal.SIGKILL)
        wait_for_step(job, run, log, newest(run) + 20)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) != 0
    said = log.read_text()
    assert said.count("another process of the job is gone") == 1, said
    # Of the killed one (-9) and rank 0, which missed it (3) or which torchrun stopped (-15), torchrun names one.
    assert re.search(r"failed \(exitcode: (-9|3|-15)\)", said), said
    assert said.count("going on from step") == 1, said
    stopped = newest(run)
    assert said.count(f"sdd: interrupted at step {stopped} and saved; go on with: sdd resume {run}") == 1, said
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"

    in_world(2, train, replace(CONFIG, steps=stopped + 5), tmp_path / "whole")
    whole = [row for row in rows(tmp_path / "whole") if "loss" in row]
    assert rows(run) == whole[:stopped], "bit for bit, through the kill and the restart"
    reopen(run, stopped + 5).run()
    rest = [row for row in rows(run) if "loss" in row][stopped:]
    assert len(rest) == 5
    for one, other in zip(rest, whole[stopped:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5), "on one process from there"


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path, monkeypatch):
    log, ended = tmp_path / "log", tmp_path / "ended"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(ended))
    with torchrun(log, "train", "nano", "--data", "/nowhere/tokens.npy", "--out", str(tmp_path / "run")) as job:
        assert job.wait(120) != 0
    said = log.read_text()
    assert said.count("sdd: no data at /nowhere/tokens.npy") == 1, said
    assert "exitcode  : 2" in said, said
    assert '"errorCode": 2}' in ended.read_text(), "by which examples/slurm.sbatch knows a mistake"
    assert not (tmp_path / "run").exists()
