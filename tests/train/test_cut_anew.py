"""A run that goes on with its batch cut into other parts: the same batches and losses, or a refusal."""

from dataclasses import replace

import pytest
from helpers_train import little, rows

from sdd.commands.main import main
from sdd.errors import UserError
from sdd.models import MoEConfig
from sdd.train import config_io
from sdd.train.trainer import reopen, start


def stopped(config, out):
    """A run that stands at step 4 of its steps."""
    start(replace(config, steps=4), out).run()


def reopened(run, accumulate=None):
    """The config of the run as it goes on, and its step."""
    trainer = reopen(run, 8, parallel=None if accumulate is None else {"accumulate": accumulate})
    trainer.run_dir.unlock()
    return trainer.config, trainer.step


def losses(run):
    return [row["loss"] for row in rows(run) if "loss" in row]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_other_parts_make_the_same_run(tmp_path, capsys, accumulate):
    config = little(tmp_path / "data", accumulate=2, steps=8, eval_every=0, sample_tokens=0)
    config = replace(config, optim=replace(config.optim, schedule="constant"))
    start(config, tmp_path / "whole").run()
    run = tmp_path / "run"
    stopped(config, run)
    assert main(["resume", str(run), "--steps", "8", "--accumulate", str(accumulate)]) == 0
    assert f"settings changed since step 4: accumulate 2 -> {accumulate}" in capsys.readouterr().err
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert config_io.load(run / "config.json").accumulate == accumulate, "and the next resume keeps it"


@pytest.mark.parametrize(
    ("given", "line"), [("3", "accumulate=3 does not divide data.batch_size=4"), ("0", "accumulate=0 must be at least")]
)
def test_parts_that_do_not_fit_are_refused_and_the_run_stays(tmp_path, given, line):
    run = tmp_path / "run"
    stopped(little(tmp_path / "data", steps=8), run)
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=line):
        reopened(run, given)
    assert (run / "config.json").read_bytes() == before
    assert reopened(run)[1] == 4, "the refusal has let go of the run"


@pytest.mark.parametrize("balance", [0.1, 0.0])
def test_a_balance_loss_is_not_changed(tmp_path, balance):
    """It is that of the tokens in memory at once."""
    config = little(tmp_path / "data", steps=8)
    moe = MoEConfig(3, 2, balance_loss=balance)
    run = tmp_path / "run"
    stopped(replace(config, model=replace(config.model, d_ff=16, moe=moe)), run)
    if not balance:
        assert reopened(run, "2")[0].accumulate == 2
        return
    with pytest.raises(UserError, match=r"--accumulate 2 would change the balance loss .* leave it at 1$"):
        reopened(run, "2")
    assert reopened(run, "1")[0].accumulate == 1
