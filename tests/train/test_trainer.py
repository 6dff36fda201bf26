import json
from dataclasses import replace

import pytest
import torch
from helpers_train import TINY, assert_same_tensors, little, rows, tiny

from sdd.errors import RunFailed, UserError
from sdd.placement import placements
from sdd.train import config_io
from sdd.train.checkpoint import list_checkpoints
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, reopen, start


def train(out, config=TINY):
    return start(config, out).run()


def resume(out, steps=None):
    return reopen(out, steps).run()


def test_the_files_of_a_run(tmp_path):
    result = train(tmp_path / "run")
    found = {path.name for path in (tmp_path / "run").iterdir()} - {"tensorboard"}
    assert found == {
        "config.json", "environment.json", "metrics.jsonl", "probe.jsonl", "samples.jsonl", "result.json",
        "checkpoints", "lock",
    }  # fmt: skip
    metrics = rows(tmp_path / "run", timed=True)
    steps = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert set(steps[0]) == {"step", "loss", "grad_norm", "lr", "tokens", "seconds", "time", "tokens_per_second"}
    assert steps[-1]["tokens"] == 12 * 4 * 32
    evaluations = [row for row in metrics if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [6, 12]
    assert result["eval_loss"] == evaluations[-1]["eval_loss"]
    assert result["status"] == "done"
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text())
    assert sample["text"]


def test_the_same_config_gives_the_same_run_bit_for_bit(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    train(tmp_path / "c", replace(TINY, seed=1))
    assert rows(tmp_path / "c") != rows(tmp_path / "a")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, accumulate):
    config = replace(TINY, accumulate=accumulate)
    train(tmp_path / "whole", config)
    trainer = start(config, tmp_path / "cut")
    trainer.run_dir.append("metrics.jsonl", {"step": 0})
    while trainer.step < 5:  # as a killed process leaves it: a checkpoint at 4, metrics up to 5
        loss, _ = trainer.train_step(trainer.step)
        trainer.step += 1
        trainer.run_dir.append("metrics.jsonl", {"step": trainer.step, "loss": loss.item()})
        if trainer.step == 4:
            trainer.save()
    trainer.run_dir.unlock()
    resumed = reopen(tmp_path / "cut")
    assert resumed.step == 4
    resumed.run()
    whole = {row["step"]: row for row in rows(tmp_path / "whole") if "loss" in row}
    cut = {row["step"]: row for row in rows(tmp_path / "cut") if row.get("step", 0) > 4 and "loss" in row}
    assert cut == {step: row for step, row in whole.items() if step > 4}
    last = list_checkpoints(tmp_path / "whole" / "checkpoints")[-1]
    other = list_checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    assert_same_tensors(last, other)


def test_accumulation_does_not_change_the_step(tmp_path):
    whole = Trainer(TINY, RunDir(tmp_path))
    parts = Trainer(replace(TINY, accumulate=4), RunDir(tmp_path))
    for step in range(3):
        loss, norm = whole.train_step(step)
        loss_of_parts, norm_of_parts = parts.train_step(step)
        torch.testing.assert_close(loss_of_parts, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm_of_parts, norm, rtol=1e-4, atol=1e-5)


def test_weight_decay_goes_by_role_and_every_parameter_has_one(tmp_path):
    trainer = Trainer(replace(TINY, optim=replace(TINY.optim, weight_decay=0.5)), RunDir(tmp_path))
    roles = {group["role"]: group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert roles == {"matrix": 0.5, "embedding": 0.0, "alpha": 0.0}
    names = [name for group in trainer.optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in trainer.model.named_parameters())


def test_gradients_are_dropped_after_the_step(tmp_path):
    trainer = Trainer(TINY, RunDir(tmp_path))
    trainer.train_step(0)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_gradients_are_clipped_to_the_limit(tmp_path):
    trainer = Trainer(replace(TINY, optim=replace(TINY.optim, grad_clip=0.01)), RunDir(tmp_path))
    _, before = trainer.gradients(0)
    after = torch.nn.utils.get_total_norm([parameter.grad for parameter in trainer.model.parameters()])
    assert before > 0.01
    assert after.item() == pytest.approx(0.01, rel=1e-3)


def test_evaluation_matches_the_definition(tmp_path):
    trainer = Trainer(TINY, RunDir(tmp_path))
    evaluation = trainer.evaluate()
    windows = trainer.eval_windows
    with torch.no_grad():
        logits = trainer.model(windows[:, :-1])
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    n_bytes = len(b"".join(trainer.data.tokenizer.decode(row.tolist()).encode() for row in windows[:, 1:]))
    assert evaluation.loss == pytest.approx(nll.item() / windows[:, 1:].numel(), rel=1e-5)
    assert evaluation.bits_per_byte == pytest.approx(nll.item() / 0.6931471805599453 / n_bytes, rel=0.01)
    assert trainer.model.training


HOT = replace(TINY.optim, lr=1e30, warmup=0, grad_clip=0.0)


def test_a_run_that_is_no_longer_finite_fails_and_says_so(tmp_path):
    config = tiny("postnorm", optim=HOT, guard=replace(TINY.guard, nonfinite="stop"))
    with pytest.raises(RunFailed, match="not finite"):
        train(tmp_path / "run", config)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["cause"]) == ("failed", "diverged")
    assert "not finite" in result["reason"]
    assert rows(tmp_path / "run")[-1]["step"] == result["step"], "the last step is in the metrics too"


def test_a_run_that_rolling_back_does_not_help_fails_at_the_step_it_did_not_pass(tmp_path):
    with pytest.raises(RunFailed, match="rolled back 3 times without getting past step 2"):
        train(tmp_path / "run", tiny("postnorm", optim=HOT))


def test_damaged_checkpoints_are_passed_over(tmp_path, capsys):
    train(tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (tensors,) = newest.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    before = rows(tmp_path / "run")
    trainer = reopen(tmp_path / "run")
    assert trainer.step == 8
    trainer.run()
    assert "passed over" in capsys.readouterr().err
    assert rows(tmp_path / "run") == before


def test_two_processes_cannot_write_into_one_run(tmp_path):
    trainer = start(TINY, tmp_path / "run")
    with pytest.raises(UserError, match="another process"):
        reopen(tmp_path / "run")
    trainer.run_dir.unlock()
    reopen(tmp_path / "run").run_dir.unlock()


def test_nothing_the_user_had_is_overwritten(tmp_path):
    train(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run already"):
        start(TINY, tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        start(TINY, tmp_path / "other")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_start_that_was_killed_before_its_config_stood_can_be_repeated(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / ".tmp-config.json-4711-12").write_text('{"half')
    assert train(tmp_path / "run", replace(TINY, steps=1))["status"] == "done"


def test_a_complete_run_goes_on_only_with_more_steps(tmp_path):
    train(tmp_path / "run", replace(TINY, optim=replace(TINY.optim, schedule="constant")))
    with pytest.raises(UserError, match="complete at step 12"):
        reopen(tmp_path / "run")


def test_more_steps_go_on(tmp_path):
    config = replace(TINY, optim=replace(TINY.optim, schedule="constant"))
    train(tmp_path / "run", config)
    resume(tmp_path / "run", 14)
    train(tmp_path / "whole", replace(config, steps=14))
    losses = [[row["loss"] for row in rows(tmp_path / run) if "loss" in row] for run in ("run", "whole")]
    assert losses[0] == losses[1]


def test_changed_data_are_refused(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 3000)
    config = replace(TINY, data=replace(TINY.data, path=str(text)))
    train(tmp_path / "run", config)
    text.write_text("something else entirely, and longer than before\n" * 3000)
    with pytest.raises(UserError, match="not those that"):
        reopen(tmp_path / "run", 20)


def first_loss(out, **changes):
    return Trainer(replace(TINY, **changes), RunDir(out)).train_step(0)[0]


@pytest.mark.parametrize("option", ["activation_checkpointing", "chunked_loss"])
def test_options_that_save_memory_do_not_change_the_loss(tmp_path, option):
    torch.testing.assert_close(first_loss(tmp_path, **{option: True}), first_loss(tmp_path), rtol=1e-5, atol=1e-6)


def test_z_loss_changes_the_gradients_but_not_the_logged_loss(tmp_path):
    configs = (TINY, replace(TINY, optim=replace(TINY.optim, z_loss=1e-2)))
    (loss, norm), (loss_with_z, norm_with_z) = (Trainer(each, RunDir(tmp_path)).train_step(0)[:2] for each in configs)
    assert loss_with_z == loss
    assert norm_with_z != norm


def test_a_document_mask_changes_the_loss(tmp_path):
    """The documents are about 64 tokens long, so that most windows cross the end of one."""
    config = little(tmp_path)
    masked = replace(config, data=replace(config.data, document_mask=True))
    losses = [Trainer(each, RunDir(tmp_path)).train_step(0)[0] for each in (config, masked)]
    assert losses[1].isfinite()
    assert losses[0] != losses[1]


def test_bfloat16_autocast_on_cpu_is_near_float32(tmp_path):
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(replace(TINY, precision=precision), RunDir(tmp_path))
        losses.append(torch.stack([trainer.train_step(step)[0] for step in range(4)]))
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=5e-3)
    assert not torch.equal(losses[0], losses[1])


def test_threads_are_set_and_recorded(tmp_path):
    before = torch.get_num_threads()
    try:
        train(tmp_path / "run", replace(TINY, threads=1, steps=1))
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["threads"] == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("placement", list(placements))
def test_every_placement_trains_and_resumes(tmp_path, placement):
    """Two blocks of nano start at a loss of about 8.5 nats, and lose at least 1.2 in 40 steps, resumed at the half."""
    from sdd.train import preset

    nano = preset("nano")
    config = replace(
        nano,
        model=replace(nano.model, n_layers=2, context=32, placement=placements[placement]),
        # nGPT's logits start within 1, and their scale grows with the rate
        optim=replace(nano.optim, schedule="constant", warmup=10, lr=0.016 if placement == "ngpt" else nano.optim.lr),
        steps=20,
        eval_sequences=16,
        sample_tokens=0,
    )
    before = Trainer(config, RunDir(tmp_path)).evaluate().loss
    train(tmp_path / "run", config)
    result = resume(tmp_path / "run", 40)
    assert result["step"] == 40
    assert before - result["eval_loss"] > 1.2


def test_a_run_that_ended_before_its_first_step_does_not_block_its_folder(tmp_path):
    for name in ("whole", "failed"):
        trainer = start(TINY, tmp_path / name)
        trainer.run_dir.write_json("environment.json", trainer.environment())
        with trainer.log.open(0):
            pass
        trainer.run_dir.unlock()
    config = replace(TINY, seed=3, steps=2)
    again = start(config, tmp_path / "failed")
    assert again.run()["step"] == 2
    assert config_io.load(tmp_path / "failed" / "config.json").seed == 3
    with pytest.raises(UserError, match="holds a run already"):
        start(config, tmp_path / "failed")
    assert resume(tmp_path / "whole")["status"] == "done"


def test_a_config_that_the_user_wrote_is_not_replaced(tmp_path):
    config_io.save(TINY, tmp_path / "config.json")
    with pytest.raises(UserError, match="holds a run already"):
        start(replace(TINY, seed=1), tmp_path)
    assert config_io.load(tmp_path / "config.json") == TINY


def test_rows_of_a_run_with_z_loss_tell_what_was_minimised_from_the_cross_entropy(tmp_path):
    train(tmp_path / "z", replace(TINY, steps=2, optim=replace(TINY.optim, z_loss=0.1)))
    first = next(row for row in rows(tmp_path / "z") if "loss" in row)
    plain = start(TINY, tmp_path / "plain")
    loss, _ = plain.train_step(0)
    plain.run_dir.unlock()
    assert first["loss"] == pytest.approx(loss.item())
    assert first["total_loss"] > first["loss"]


def test_a_resumed_run_removes_what_a_killed_process_left(tmp_path):
    train(tmp_path / "run")
    (tmp_path / "run" / f".tmp-metrics.jsonl-{2**22 + 1}-7").touch()  # more than the largest number of a process
    resume(tmp_path / "run", 13)
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_an_old_run_whose_warm_up_does_not_fit_says_so_when_it_goes_on(tmp_path, capsys):
    config = replace(TINY, steps=4, optim=replace(TINY.optim, warmup=9))
    train(tmp_path / "run", config)
    capsys.readouterr()
    resume(tmp_path / "run", 5)
    assert "optim.warmup=9 does not fit steps=5" in capsys.readouterr().err
