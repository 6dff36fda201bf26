"""`compile: auto`: when it pays, what it becomes, and what happens where nothing can be compiled."""

import json
from dataclasses import replace
from pathlib import Path

import helpers_train
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo import exc

from sdd.commands.main import main
from sdd.errors import UserError
from sdd.train import compiling, config_io, preset
from sdd.train.compiling import Estimate, estimate
from sdd.train.parallel import ALONE
from sdd.train.trainer import Trainer, reopen, start

TINY = replace(helpers_train.TINY, steps=2, probe_every=0, sample_tokens=0)
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "compile_pays_cpu.json"
CPU = torch.device("cpu")
COMPILER_ERROR = "CppCompileError: C++ compile error\n\nCommand:\ng++ x\n\nOutput:\nld: cannot find -ltorch\nmore\n"


@pytest.fixture
def compiled(monkeypatch):
    """The models that were to be compiled; none is, and a tiny run counts as long enough."""
    found = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: found.append(module))
    monkeypatch.setattr(compiling, "why_not", lambda device: None)
    monkeypatch.setattr(compiling, "estimate", lambda *_, **__: Estimate(saved=100.0, taken=10.0))
    return found


def cannot_compile(*_, **__):
    raise RuntimeError(COMPILER_ERROR)


def config_of(trainer):
    """The config of a trainer, which lets go of its folder."""
    trainer.run_dir.unlock()
    return trainer.config


def lines(capsys):
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "row", json.loads(RESULT.read_text())["rows"], ids=lambda row: row["preset"] + row["precision"]
)
def test_the_rule_agrees_with_what_was_measured(row):
    def pays(steps):
        config = replace(preset(row["preset"]), steps=round(steps))
        return estimate(config, "cpu", bfloat16=row["precision"] == "bfloat16", threads=1).pays

    even = row["break_even_steps"]
    assert not pays(even or 10**9)
    assert even is None or pays(4 * even)


@given(st.sampled_from(["nano", "micro", "1b", "moe-nano"]), st.integers(1, 10**7), st.integers(1, 64))
def test_longer_runs_save_more_and_more_threads_less(name, steps, threads):
    config = replace(preset(name), steps=steps)
    found = estimate(config, "cpu", threads=threads)
    assert found.saved < estimate(replace(config, steps=2 * steps), "cpu", threads=threads).saved
    assert found.saved > estimate(config, "cpu", threads=2 * threads).saved
    assert found.taken == estimate(replace(config, steps=2 * steps), "cpu", threads=threads).taken


def test_a_long_run_is_compiled_and_stays_so(compiled, tmp_path, capsys, monkeypatch):
    start(TINY, tmp_path / "run").run()
    assert len(compiled) == 1
    assert config_io.load(tmp_path / "run" / "config.json").compile is True
    said = lines(capsys)
    assert any(line.startswith("compiled: that takes about 0:10 and saves 1:40") for line in said)
    assert any("float32, compiled on cpu" in line for line in said)
    monkeypatch.setattr(compiling, "estimate", lambda *_, **__: Estimate(0.0, 10.0))  # as on another machine
    assert config_of(reopen(tmp_path / "run", 3)).compile is True
    assert len(compiled) == 2


def test_a_short_run_is_not_compiled_and_stays_so(compiled, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "estimate", estimate)
        start(TINY, tmp_path / "run").run()
    assert any(line.startswith("not compiled: that would take about") for line in lines(capsys))
    assert config_io.load(tmp_path / "run" / "config.json").compile is False
    assert config_of(reopen(tmp_path / "run", 3)).compile is False
    assert not compiled


def test_without_a_compiler_auto_is_eager_and_says_why(compiled, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "estimate", lambda *_, **__: Estimate(100.0, 10.0))
    monkeypatch.setattr(torch, "compile", cannot_compile)
    assert config_of(start(TINY, tmp_path / "run")).compile is False
    assert "not compiled: torch.compile does not work here (ld: cannot find -ltorch)" in lines(capsys)
    assert config_io.load(tmp_path / "run" / "config.json").compile is False


def test_without_a_compiler_true_is_refused_before_there_is_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", cannot_compile)
    assert main(["train", "nano", "--steps", "1", "--compile", "true", "--out", str(tmp_path / "run")]) == 2
    assert lines(capsys)[-1].startswith("sdd: compile=true, but torch.compile does not work here (ld: cannot find")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", ["auto", True])
def test_a_model_that_does_not_compile(compiled, tmp_path, capsys, monkeypatch, asked):
    def fail(trainer):
        raise exc.TorchDynamoException("no such operation")

    monkeypatch.setattr(Trainer, "warm_up", fail)
    if asked is True:
        with pytest.raises(UserError, match=r"compile=true, but .*no such operation"):
            start(replace(TINY, compile=True), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    else:
        assert config_of(start(TINY, tmp_path / "run")).compile is False
        assert any(line.startswith("not compiled: ") and "no such operation" in line for line in lines(capsys))


def test_warming_up_changes_no_bit(tmp_path):
    warm, cold = (start(TINY, tmp_path / name) for name in ("warm", "cold"))
    warm.warm_up()
    for step in range(2):
        assert torch.equal(torch.stack(warm.train_step(step)), torch.stack(cold.train_step(step)))
    for trainer in (warm, cold):
        trainer.run_dir.unlock()


def test_a_space_in_torchs_path_is_named_as_the_cause(monkeypatch):
    monkeypatch.setattr(torch, "compile", cannot_compile)
    monkeypatch.setattr(torch, "__file__", "/home/me/my project/torch/__init__.py")
    assert "/home/me/my project/torch, and its compiler call breaks at the space" in str(compiling.why_not(CPU))


def test_a_config_that_says_it_is_not_decided_again(compiled):
    for choice in (True, False):
        config = replace(TINY, compile=choice)
        assert compiling.decide(config, ALONE) == (config, None)


def test_what_a_compiler_would_not_round_is_not_compiled(compiled):
    model = replace(TINY.model, statistics="bfloat16")
    config, line = compiling.decide(replace(TINY, model=model, compile="auto"), ALONE)
    assert config.compile is False
    assert "model.statistics=bfloat16" in (line or "")
    with pytest.raises(ValueError, match=r"model\.statistics=bfloat16 would not round everywhere"):
        replace(TINY, model=model, compile=True)
