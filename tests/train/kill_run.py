"""Kill `sdd train` and `sdd resume` at drawn moments, until the run is done, and compare it with one left alone.

By hand, with as many kills as wanted:

    python tests/train/kill_run.py --kills 100

Real processes get SIGKILL: while they start, between steps, and while they save. After each kill the newest whole
checkpoint must be at least as new as before, and the next process must find it by itself; in the end every loss and
every tensor of the last checkpoint must be, bit for bit, those of the uninterrupted run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from helpers_train import TINY, assert_same_tensors, rows

from sdd.errors import UserError
from sdd.train import config_io
from sdd.train.checkpoint import half_written, list_checkpoints, read_state, step_of, verify

PATIENCE = 300.0  # seconds until a process that does nothing is a failure
POLL = 0.0005
MOMENTS = ("starting", "stepping", "saving", "saving")


@dataclass(frozen=True)
class Kill:
    """One kill: what the process was meant to be doing, what it left, and where the next one has to go on."""

    moment: str
    left_half_written: bool
    step: int


def config(steps, **changes):
    """A run of that many steps which saves every fourth, on one thread."""
    return replace(TINY, steps=steps, keep_checkpoints=2, eval_every=0, threads=1, device="cpu", **changes)


def killed_run(settings, folder, kills, seed, say=lambda line: None, begin=None, begins_within=4.0):
    """Train with `settings` in `folder`, killed that many times at moments drawn from `seed`; returns the kills.

    It ends earlier if the run is done before it could be killed as often.

    Args:
        settings, folder, kills, seed: as above.
        say: told of each kill.
        begin: begins a process with the arguments of `sdd`; a Python of its own unless said.
        begins_within: seconds until such a process trains.
    """
    begin = begin or python
    draw, done, run = random.Random(seed), [], folder / "killed"
    save_seconds = 0.04  # about what one takes
    while len(done) < kills:
        process = begin(command(settings, folder, run))
        moment = draw.choice(MOMENTS)
        try:
            if moment == "starting":
                time.sleep(draw.uniform(0, begins_within))
            elif moment == "stepping":
                aim = rows_of(run) + draw.randint(1, 20)
                wait(process, lambda aim=aim: rows_of(run) >= aim)
                time.sleep(draw.uniform(0, 0.02))
            else:
                for _ in range(draw.randint(1, 3)):
                    wait(process, lambda: not half_written(run / "checkpoints"))
                    wait(process, lambda: half_written(run / "checkpoints"))
                time.sleep(draw.uniform(0, save_seconds))
            alive = process.poll() is None
        finally:
            process.kill()
        _, err = process.communicate()
        check_said(err, done[-1] if done else None, run)
        if not alive and process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, err
            return done
        done.append(Kill(moment, bool(half_written(run / "checkpoints")), newest_whole(run)))
        assert done[-1].step >= max((kill.step for kill in done), default=0), "a whole checkpoint was lost"
        say(f"kill {len(done)}: {moment}, {'in mid-save, ' * done[-1].left_half_written}whole at step {done[-1].step}")
    _, err = (process := begin(command(settings, folder, run))).communicate(timeout=PATIENCE * 10)
    assert process.returncode == 0, err
    check_said(err, done[-1], run)
    return done


def command(settings, folder, run):
    """The arguments of `sdd train`, or of `sdd resume` once there is a run."""
    if (run / "config.json").exists():
        return ["resume", str(run)]
    config_io.save(settings, folder / "settings.json")
    return ["train", str(folder / "settings.json"), "--out", str(run)]


def python(words):
    """`sdd WORDS` in a Python of its own."""
    words = [sys.executable, "-m", "sdd", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait(process, reached):
    """Wait until `reached()`, or the process has ended."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and not reached():
        if time.monotonic() > end:
            process.send_signal(signal.SIGABRT)  # Python tells where it stands
            raise AssertionError(f"nothing happens: {process.communicate()[1]}")
        time.sleep(POLL)


def rows_of(run):
    """Rows of metrics.jsonl so far."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def newest_whole(run):
    """The step of the newest checkpoint that is whole, 0 if there is none."""
    for path in reversed(list_checkpoints(run / "checkpoints")):
        try:
            verify(path, read_state(path))
        except UserError:
            continue
        return step_of(path)
    return 0


def check_said(err, last, run):
    """That a process did not end by itself badly, went on where the last one was killed, and named what it left."""
    assert "Traceback" not in err, err
    if last is None or f"into {run}" not in err:  # killed before it said where it goes on
        return
    if last.step:
        assert f"going on from step {last.step}\n" in err, err
    if last.left_half_written:
        assert "is half-written" in err, err


def compare(whole, killed):
    """Every loss and every tensor of the last checkpoint, bit for bit."""
    assert rows(whole) == rows(killed)
    assert (whole / "samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()
    one, two = (list_checkpoints(run / "checkpoints")[-1] for run in (whole, killed))
    assert one.name == two.name
    assert_same_tensors(one, two)
    assert [path.name for path in (killed / "checkpoints").iterdir() if not path.name.startswith("step-")] == []
    assert read_environment(whole) == read_environment(killed)


def read_environment(run):
    """The recorded parts of the environment on which bit-equality depends."""
    found = json.loads((run / "environment.json").read_text())
    return {name: found[name] for name in ("torch", "cpu", "device", "precision", "threads")}


def main():
    """The long version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = config(steps=20 * options.kills + 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        process = python(command(settings, folder, folder / "whole"))
        assert process.wait() == 0, process.stderr.read()
        done = killed_run(settings, folder, options.kills, options.seed, lambda line: print(line, flush=True))
        compare(folder / "whole", folder / "killed")
    moments = ", ".join(f"{count} {moment}" for moment, count in Counter(kill.moment for kill in done).items())
    print(
        f"{len(done)} kills ({moments}; {sum(kill.left_half_written for kill in done)} left a half-written checkpoint) "
        f"over {settings.steps} steps in {time.monotonic() - began:.0f} s: bit-equal to the uninterrupted run"
    )


if __name__ == "__main__":
    main()
