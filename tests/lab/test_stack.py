"""Grids whose runs share processes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers_grid import tiny_run

from sdd.commands.main import main
from sdd.errors import UserError
from sdd.lab import results
from sdd.lab.definition import PlannedStudy, Request
from sdd.lab.grid import runner
from sdd.lab.grid.runner import Grid
from sdd.lab.results import HeldOut, harvest
from sdd.lab.studies import studies
from sdd.placement import placements
from sdd.train.config import GuardConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """As a study with stacks makes a run."""
    observed = GuardConfig(nonfinite="stop")
    return tiny_run(tmp_path_factory.mktemp("text"), steps=20, eval_every=10, guard=observed, probe_every=0)


@pytest.fixture
def started(monkeypatch):
    """The runs of every process that a grid starts, and what it was told to run; at once, in this process."""
    found = []

    class Here:
        def __init__(self, command, **_):
            from sdd.lab.grid import stack

            words = list(map(str, command[2:]))
            found.append(words)
            self.code = stack.main(words[1:]) if words[0] == "sdd.lab.grid.stack" else main(words[1:])

        def poll(self):
            return self.code

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=Here, DEVNULL=None))
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.0)
    return found


def placed(config, name):
    return replace(config, model=replace(config.model, placement=placements[name]))


def test_runs_of_one_shape_share_a_process_and_have_results_of_their_own(tiny, started, tmp_path):
    wild = replace(tiny, optim=replace(tiny.optim, lr=1e30, warmup=0))
    runs = {"a": tiny, "b": placed(tiny, "peri"), "c": replace(tiny, seed=1), "d": wild, "e": replace(tiny, seed=2)}
    grid = Grid(list(runs.items()), tmp_path, workers=1, stack=3)
    grid.run()
    assert [words[0:1] + words[2:] for words in started if "stack" in words[0]] == [
        ["sdd.lab.grid.stack", "a", "c", "d"]
    ]
    assert [words[1] for words in started if "stack" not in words[0]] == ["train", "train"]
    assert {job.name: job.state for job in grid.jobs} == dict.fromkeys("abce", "done") | {"d": "failed"}
    held_out = HeldOut(tiny)
    for name in "ac":
        found = harvest(tmp_path / "runs" / name, held_out)
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        result.pop("tuning_loss")
        (tmp_path / "runs" / name / "result.json").write_text(json.dumps(result))
        again = harvest(tmp_path / "runs" / name, held_out)  # from the checkpoint
        assert found.tuning_loss == pytest.approx(again.tuning_loss, abs=2e-6)
        assert found.environment["stack"] == 3
        assert results.answers(found, replace(runs[name], probe_every=50))


def test_a_stack_goes_on_with_what_was_begun(tiny, started, tmp_path):
    runs = [("a", replace(tiny, steps=10, eval_every=10)), ("b", replace(tiny, steps=10, seed=1))]
    Grid(runs, tmp_path, workers=1, stack=2).run()
    assert Grid(runs, tmp_path, workers=1, stack=2).waiting == []
    assert len(started) == 1


@pytest.mark.parametrize("name", ["decay", "eps", "gradients", "similarity", "depth"])
def test_a_study_that_probes_refuses_stacks(name, tmp_path):
    with pytest.raises(UserError, match=f"the study {name} probes its runs, and runs of a stack are not probed"):
        PlannedStudy(studies[name], Request(out=tmp_path, preset="nano", seeds=1, stack=4))


def test_a_study_by_stacks_has_the_results_of_one_by_runs(started, tmp_path):
    small = [
        "--preset",
        "nano",
        "--model.n_layers",
        "1",
        "--model.d_model",
        "16",
        "--model.d_ff",
        "32",
        "--model.context",
        "16",
        "--steps",
        "10",
    ]
    rest = [
        "--placements",
        "sdd",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--threads",
        "1",
        "--eval_sequences",
        "4",
        "--lr",
        "0.001",
    ]
    for name, options in {"runs": [], "stacks": ["--stack", "20"]}.items():
        assert main(["study", "robustness", *small, *rest, *options, "--out", str(tmp_path / name)]) == 0
    one, other = (
        {file.stem: results.load(file) for file in (tmp_path / name / "results").iterdir()}
        for name in ("runs", "stacks")
    )
    assert one.keys() == other.keys()
    for name, found in one.items():
        assert found.eval_loss == pytest.approx(other[name].eval_loss, rel=1e-4)
        assert found.tuning_loss == pytest.approx(other[name].tuning_loss, rel=1e-4)
        assert found.status == other[name].status
        assert other[name].environment["stack"] == 5
