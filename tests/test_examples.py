"""The SLURM example: its syntax, what it starts, and when it goes on."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[1] / "examples" / "slurm.sbatch"
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")


def test_the_syntax_is_bash():
    subprocess.run([BASH, "-n", SLURM], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", SLURM], check=True)


def test_directives_come_before_the_first_command():
    """sbatch ignores those that come later."""
    lines = SLURM.read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert sum(line.startswith("#SBATCH --") for line in lines[:first]) >= 8
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


def job(folder, exit_code=0, restarts=0, words=("1b", "--lr", "0.1"), ended=""):
    """What the job runs, with stand-ins for SLURM's commands and for a torchrun that says how its processes ended."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    scripts = {
        "scontrol": '[[ $1 == show ]] && printf "n1\\nn2\\n" || echo "$@" >> calls',
        "srun": 'shift; SLURM_PROCID=0 exec "$@"',
        "torchrun": f'echo "$@" >> calls; echo \'{ended}\' > "$TORCHELASTIC_ERROR_FILE"; exit {exit_code}',
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    values = {"JOB_NAME": "sdd", "JOB_ID": "7", "JOB_NODELIST": "n[1-2]", "NNODES": "2", "GPUS_ON_NODE": "8"}
    environment = {f"SLURM_{name}": value for name, value in values.items()} | {"SLURM_RESTART_COUNT": str(restarts)}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}"}
    (folder / "calls").unlink(missing_ok=True)
    done = subprocess.run([BASH, SLURM, *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_a_new_job_trains_and_a_requeued_one_resumes(tmp_path):
    run = tmp_path / "runs" / "sdd-7"
    code, (line,) = job(tmp_path)
    assert code == 0
    assert "--nnodes 2 --nproc-per-node 8" in line
    assert "--rdzv-endpoint n1:29500 --rdzv-id 7-0" in line
    assert line.endswith(f"-m sdd train 1b --lr 0.1 --out {run}")
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    code, (line,) = job(tmp_path, restarts=1)
    assert line.endswith(f"--rdzv-id 7-1 --max-restarts 3 -m sdd resume {run}")


def test_a_job_that_is_stopped_is_requeued_a_few_times(tmp_path):
    code, calls = job(tmp_path, exit_code=1)
    assert code == 1
    assert calls[1:] == ["requeue 7"]
    assert job(tmp_path, exit_code=1, restarts=10)[1][1:] == []
    assert job(tmp_path, exit_code=0)[1][1:] == []


def how(code):
    """What torchrun writes of a process that ended with this code."""
    return json.dumps({"message": {"message": "sdd ended", "extraInfo": {"timestamp": "1"}, "errorCode": code}})


@pytest.mark.parametrize("code", [1, 3, 23, 130, -9])
def test_what_a_new_attempt_may_mend_is_requeued(tmp_path, code):
    assert job(tmp_path, exit_code=1, ended=how(code))[1][1:] == ["requeue 7"]


@pytest.mark.parametrize(("exit_code", "ended"), [(1, how(2)), (2, ""), (126, ""), (127, "")])
def test_a_mistake_is_not_requeued(tmp_path, exit_code, ended):
    """A wrong option is one in the next attempt too."""
    code, calls = job(tmp_path, exit_code=exit_code, ended=ended)
    assert code == exit_code
    assert calls[1:] == []
    assert list((tmp_path / "runs").iterdir()) == [], "what was noted is removed"
