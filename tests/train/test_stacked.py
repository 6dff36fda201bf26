"""Stacks of runs: each run is what it would be alone."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from helpers_train import little, rows, tiny

from sdd.errors import Interrupted, UserError
from sdd.placement import Norm, placements
from sdd.train import config_io
from sdd.train.config import GuardConfig
from sdd.train.learner import Learner
from sdd.train.optim import clip_gradients
from sdd.train.parallel import ALONE
from sdd.train.stacked import Stack, _norms, shape_of, stacks, why_alone
from sdd.train.stacked_run import StackedRun, open_run
from sdd.train.trainer import reopen, start

OBSERVED = GuardConfig(nonfinite="stop", spikes="observe")
FREE = [name for name, placement in placements.items() if placement.weights == "free"]


def stackable(config, **changes):
    """The run as a study with stacks makes it."""
    return replace(config, guard=OBSERVED, sample_tokens=0, probe_every=0, device="cpu", compile=False, **changes)


def several(config):
    """Three runs that differ in all that a stack allows."""
    optim, model = config.optim, config.model
    draws = replace(model.placement, init="base")
    return [
        config,
        replace(config, seed=7, optim=replace(optim, lr=1e-2, warmup=0, weight_decay=0.3, alpha_lr=2.0)),
        replace(
            config,
            seed=3,
            model=replace(model, init_scale=0.3, placement=draws),
            optim=replace(optim, schedule="wsd", alpha_weight_decay=0.1, embedding_weight_decay=0.2, final_lr=0.5),
        ),
    ]


def alone(learner, steps):
    """Loss and gradient norm of each step of an ordinary run."""
    found = []
    for step in range(steps):
        loss = learner.backward(step)
        found.append((loss.item(), clip_gradients(learner.model, learner.config.optim.grad_clip).item()))
        learner.update()
    return torch.tensor(found, dtype=torch.float64)


def doubled(config):
    """The parts of a run, in float64."""
    learner = Learner(config, ALONE)
    learner.model.double()
    return learner


@pytest.mark.parametrize("placement", FREE)
def test_every_run_of_a_stack_equals_itself_alone(placement, tmp_path):
    config = stackable(little(tmp_path))
    model = replace(config.model, placement=placements[placement], n_layers=2)
    runs = several(replace(config, model=model, optim=replace(config.optim, grad_clip=0.5)))
    stack = Stack([doubled(run) for run in runs])
    found = stack.advance(0, 3)
    for number, run in enumerate(runs):
        learner = doubled(run)
        expected = alone(learner, 3)
        torch.testing.assert_close(found[:, 0, number], expected[:, 0], rtol=1e-6, atol=0)  # a run adds up in float32
        torch.testing.assert_close(found[:, 1, number], expected[:, 1], rtol=1e-9, atol=0)
        for name, parameter in learner.model.named_parameters():
            torch.testing.assert_close(stack.parameters[name][number], parameter, rtol=1e-9, atol=1e-9)


@pytest.mark.ties  # compiles
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_stack_equals_an_eager_one(tmp_path):
    runs = several(stackable(little(tmp_path)))
    eager, compiled = (
        Stack([Learner(replace(run, compile=compile_), ALONE) for run in runs]).advance(0, 3)
        for compile_ in (False, True)
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 1023, 1024, 5000])
def test_norms_are_those_of_rows(width):
    x = torch.randn(3, width, dtype=torch.float64)
    torch.testing.assert_close(_norms(x), x.norm(dim=1))


def together(folder, configs, names=None):
    """The runs' directories after they were trained as one stack."""
    found = [folder / name for name in names or "abcdef"[: len(configs)]]
    StackedRun([open_run(config, run) for config, run in zip(configs, found, strict=True)]).run()
    return found


def assert_near(row, expected):
    """The same keys and values, numbers up to rounding; `seconds` is a matter of the clock."""
    assert row.keys() == expected.keys()
    for key in row.keys() - {"seconds"}:
        number = isinstance(expected[key], float)
        assert row[key] == (pytest.approx(expected[key], rel=1e-4, abs=1e-5) if number else expected[key]), key


def test_a_run_of_a_stack_leaves_what_a_run_leaves(tmp_path):
    configs = several(stackable(little(tmp_path / "data")))
    stacked = together(tmp_path, configs)
    for number, (config, run) in enumerate(zip(configs, stacked, strict=True)):
        start(config, tmp_path / f"alone{number}").run()
        mine, its = rows(run), rows(tmp_path / f"alone{number}")
        assert [row.keys() for row in mine] == [row.keys() for row in its]
        for one, other in zip(mine, its, strict=True):
            assert_near(one, other)
        result, expected = (
            json.loads((place / "result.json").read_text()) for place in (run, tmp_path / f"alone{number}")
        )
        assert_near(result, expected)
        assert json.loads((run / "environment.json").read_text())["stack"] == 3
        assert config_io.load(run / "config.json") == config_io.load(tmp_path / f"alone{number}" / "config.json")


def test_its_checkpoint_is_gone_on_with_alone(tmp_path):
    configs = several(stackable(little(tmp_path / "data")))
    run = together(tmp_path, configs)[1]
    trainer = reopen(run, steps=16)
    learner = Learner(configs[1], ALONE)
    alone(learner, 12)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, learner.model.get_parameter(name), rtol=1e-3, atol=1e-5)
    state = trainer.optimizer.state[trainer.model.embed.weight]
    assert state["step"] == 12
    torch.testing.assert_close(
        state["exp_avg"], learner.optimizer.state[learner.model.embed.weight]["exp_avg"], rtol=1e-3, atol=1e-6
    )
    trainer.run()
    assert rows(run)[-1]["step"] == 16


def test_a_run_that_diverges_ends_and_touches_no_other(tmp_path):
    configs = several(stackable(little(tmp_path / "data"), steps=30))
    sound = together(tmp_path, configs, ["a", "b", "c"])
    wild = replace(configs[1], optim=replace(configs[1].optim, lr=1e30, warmup=0))
    beside = together(tmp_path, [configs[0], wild, configs[2]], ["d", "e", "f"])
    result = json.loads((beside[1] / "result.json").read_text())
    assert (result["status"], result["cause"]) == ("failed", "diverged")
    assert result["reason"].startswith(f"step {result['step']}: ")
    assert rows(beside[1])[-1]["step"] == result["step"] < 30
    assert rows(beside[0]) == rows(sound[0])
    assert rows(beside[2]) == rows(sound[2])


def test_a_stack_of_diverged_runs_stops(tmp_path):
    config = stackable(little(tmp_path / "data"), steps=100_000)
    wild = replace(config, optim=replace(config.optim, lr=1e30, warmup=0))
    runs = together(tmp_path, [wild, replace(wild, seed=1)])
    assert all(json.loads((run / "result.json").read_text())["status"] == "failed" for run in runs)


def test_an_interrupted_stack_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    configs = several(stackable(little(tmp_path / "data"), steps=24))
    whole = together(tmp_path, configs, ["a", "b", "c"])
    runs = [tmp_path / name for name in "def"]
    first = StackedRun([open_run(config, run) for config, run in zip(configs, runs, strict=True)])
    advance = first.stack.advance

    def interrupted(step, until):
        signal.raise_signal(signal.SIGTERM)
        return advance(step, until)

    monkeypatch.setattr(first.stack, "advance", interrupted)
    with pytest.raises(Interrupted, match="every run of the stack is saved"):
        first.run()
    statuses = [json.loads((run / "result.json").read_text()) for run in runs]
    assert {(result["status"], result["step"]) for result in statuses} == {("interrupted", 6)}
    StackedRun([open_run(config, run) for config, run in zip(configs, runs, strict=True)]).run()
    assert [rows(run) for run in runs] == [rows(run) for run in whole]


CHANGES = {
    "has experts": {"model.moe.n_experts": 4, "model.moe.top_k": 2},
    "is moved by muon": {"optim.name": "muon"},
    "keeps lengths of weights": {"optim.weights": "rows"},
    "masks documents": {"data.document_mask": True},
    "has a z-loss": {"optim.z_loss": 1e-4},
    "cuts its batches": {"accumulate": 2},
    "recomputes activations": {"activation_checkpointing": True},
    "has a chunked loss": {"chunked_loss": True},
    "rounds statistics": {"model.statistics": "bfloat16"},
    "is probed": {"probe_every": 5},
    "writes a sample": {"sample_tokens": 4},
    "skips batches": {"guard.spikes": "skip"},
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_a_stack_cannot_do_is_named(reason, tmp_path):
    config = config_io.with_overrides(stackable(tiny()), CHANGES[reason])
    assert why_alone(config) == reason
    assert stacks([config, config], lambda run: run, 9) == [[config], [config]]
    with pytest.raises(UserError, match=f"cannot be trained in a stack, because it {reason}: train it by itself"):
        open_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_of_one_shape_share_stacks_of_the_size_asked_for():
    sdd, peri = stackable(tiny()), stackable(tiny("peri"))
    own = replace(sdd.model.placement, norms={**sdd.model.placement.norms, "q": Norm(group="head", eps=1e-4)})
    other = replace(sdd, model=replace(sdd.model, placement=own))
    runs = {
        "a": sdd,
        "b": peri,
        "c": replace(sdd, seed=1),
        "d": other,
        "e": replace(sdd, steps=3),
        "f": several(sdd)[2],
    }
    assert stacks(list(runs), lambda name: runs[name], 2) == [["a", "c"], ["b"], ["d"], ["e"], ["f"]]
    assert stacks(list(runs), lambda name: runs[name], 9) == [["a", "c", "f"], ["b"], ["d"], ["e"]]
    assert shape_of(sdd) == shape_of(several(sdd)[1])


def test_runs_of_two_shapes_are_no_stack(tmp_path):
    config = stackable(little(tmp_path / "data"))
    two = [open_run(config, tmp_path / "a"), open_run(replace(config, eval_every=5), tmp_path / "b")]
    with pytest.raises(UserError, match="cannot be one stack: they differ in more than seed"):
        StackedRun(two)
