"""Mixtures of experts in runs: what is logged, several processes, checkpoints, the command line."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers_parallel import in_world
from helpers_train import TINY, rows

from sdd.commands.main import main
from sdd.errors import Interrupted
from sdd.models import MoEConfig
from sdd.placement import placements
from sdd.train.optim import optimizer_tensors
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, reopen, start

# three experts on two and four processes: some hold none of them; the auxiliary losses are large enough to be seen
MOE = MoEConfig(3, 2, d_shared=12, balance_loss=0.5, router_z_loss=0.1)
CONFIG = replace(
    TINY,
    model=replace(TINY.model, d_ff=20, moe=MOE, placement=placements["sdd-paper"]),
    data=replace(TINY.data, batch_size=8),
    steps=10,
    eval_every=5,
    eval_sequences=4,
    checkpoint_every=0,
    sample_tokens=0,
)
# what one process adds up in another order than two do
LOSS, NORM = 1e-5, 1e-4


def run(world, config, out):
    trainer = start(config, out, world)
    trainer.run()
    return {name: whole(parameter).numpy() for name, parameter in trainer.model.named_parameters()}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that one process makes of CONFIG."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, run(World(), CONFIG, out)


def test_rows_say_how_the_tokens_were_routed(alone):
    found = rows(alone[0])
    steps = [row for row in found if "loss" in row]
    assert len(steps) == CONFIG.steps
    for row in steps:
        assert 0 < row["router_entropy"] <= math.log(3) + 1e-6
        assert 1 <= row["worst_load"] <= 3 / 2
        assert row["balance_loss"] >= 0.9
        assert row["router_z_loss"] > 0
        layers = row["routing"]
        assert max(layers["worst_load"]) == pytest.approx(row["worst_load"], abs=1e-3)
        assert sum(layers["entropy"]) / 2 == pytest.approx(row["router_entropy"], abs=1e-3)
        assert sum(layers["dead_experts"]) == row["dead_experts"] == 0
    for row in found:
        if "eval_loss" in row:
            assert [sum(layer) / 3 for layer in row["expert_load"]] == pytest.approx([1, 1], abs=1e-3)


def test_the_logged_loss_is_the_cross_entropy(alone, tmp_path):
    trainer = Trainer(CONFIG, RunDir(tmp_path))
    batch = trainer.loader.batch(0)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.model(batch[:, :-1], batch[:, 1:]).item()
    first = rows(alone[0])[0]
    assert first["loss"] == pytest.approx(loss, abs=1e-6)
    trainer.model.train()
    total = trainer.model(batch[:, :-1], batch[:, 1:]).item()
    assert total == pytest.approx(loss + 0.5 * first["balance_loss"] + 0.1 * first["router_z_loss"], abs=1e-5)


def test_several_processes_train_as_one_does(tmp_path, alone):
    """The load balancing loss is that of all processes' tokens: with their own alone, losses part at 5e-3."""
    out, reference = alone
    found = in_world(2, run, replace(CONFIG, activation_checkpointing=True), tmp_path / "run")
    for values in found:
        assert values.keys() == reference.keys()
        for name, value in values.items():
            assert (value == found[0][name]).all(), f"{name} drifts apart"
    for one, other in zip(rows(tmp_path / "run"), rows(out), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & {"loss", "eval_loss", "balance_loss", "router_z_loss", "router_entropy"}:
            assert one[name] == pytest.approx(other[name], abs=LOSS), name
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=NORM)


def two_steps(world, names, out):
    found = []
    for name in names:
        model = replace(CONFIG.model, placement=placements[name])
        trainer = Trainer(replace(CONFIG, model=model), RunDir(out), world=world)
        found.append([tuple(value.item() for value in trainer.train_step(step)) for step in range(2)])
    return found


def test_other_placements_are_trained_as_by_one_process(tmp_path):
    names = ["sdd", "sdd-released", "prenorm", "deepnorm"]
    ours, _ = in_world(2, two_steps, names, tmp_path)
    for name, one, other in zip(names, ours, two_steps(World(), names, tmp_path), strict=True):
        for (loss, norm), (other_loss, other_norm) in zip(one, other, strict=True):
            assert loss == pytest.approx(other_loss, abs=LOSS), name
            assert norm == pytest.approx(other_norm, rel=NORM), name


def state(trainer):
    named = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    return named | {name: whole(tensor) for name, tensor in optimizer_tensors(trainer.optimizer).items()}


def step_and_save(world, out, config=None):
    trainer = start(config, out, world) if config else reopen(out, world=world)
    before = state(trainer)
    trainer.train_step(trainer.step)
    trainer.step += 1
    trainer.save()
    after = state(trainer)
    trainer.run_dir.unlock()
    return [{name: tensor.numpy() for name, tensor in found.items()} for found in (before, after)]


def test_checkpoints_load_on_another_number_of_processes_bit_for_bit(tmp_path):
    out = tmp_path / "run"
    _, saved = in_world(2, step_and_save, out, CONFIG)[0]
    for size in (1, 4):
        answers = in_world(size, step_and_save, out) if size > 1 else [step_and_save(World(), out)]
        for loaded, _ in answers:
            assert loaded.keys() == saved.keys()
            for name, value in loaded.items():
                assert (value == saved[name]).all(), name
        saved = answers[0][1]


def test_a_stopped_and_resumed_run_is_the_whole_one_bit_for_bit(tmp_path, alone):
    trainer = start(CONFIG, tmp_path / "run")
    append = trainer.run_dir.append

    def stop_at_seven(name, row):
        append(name, row)
        if row["step"] == 7:
            trainer._signals.received = True

    trainer.run_dir.append = stop_at_seven
    with pytest.raises(Interrupted):
        trainer.run()
    again = reopen(tmp_path / "run")
    assert again.step == 7
    again.run()
    assert rows(tmp_path / "run") == rows(alone[0])
    for name, parameter in again.model.named_parameters():
        assert (parameter.detach().numpy() == alone[1][name]).all(), name


def dtypes(world, config, out):
    trainer = Trainer(config, RunDir(out), world=world)
    seen = {}

    def look(name):
        def hook(module, _args):
            seen.update({f"{name}.{key}": str(value.dtype) for key, value in module.named_parameters(recurse=False)})

        return hook

    for name, module in trainer.model.named_modules():
        module.register_forward_pre_hook(look(name))
    loss, _ = trainer.train_step(0)
    sharded = {name for name, parameter in trainer.model.named_parameters() if hasattr(parameter, "device_mesh")}
    return seen, sharded, loss.item()


def test_stacked_alphas_stay_whole_and_float32_and_do_not_decay(tmp_path):
    # hooks see modules that norms left out would go around, with another rounding
    config = replace(CONFIG, precision="bfloat16", model=replace(CONFIG.model, eliminate_norms=False))
    trainer = Trainer(config, RunDir(tmp_path))
    decay = {name: group["weight_decay"] for group in trainer.optimizer.param_groups for name in group["names"]}
    loss, _ = trainer.train_step(0)
    for seen, sharded, our_loss in in_world(2, dtypes, config, tmp_path):
        stacked = {name for name in decay if name.split(".")[3:4] in (["gate_proj"], ["up_proj"], ["down_proj"])}
        assert len(stacked) == 2 * 3 * 2
        for name in stacked:
            is_alpha = name.endswith("alpha")
            assert (name in sharded) != is_alpha, name
            assert decay[name] == (0 if is_alpha else 0.1), name
            if name in seen:
                assert seen[name] == ("torch.float32" if is_alpha else "torch.bfloat16"), name
        assert our_loss == pytest.approx(loss.item(), abs=LOSS)


def test_accumulated_passes_balance_their_own_tokens(tmp_path):
    """One process with two passes: counts add up, losses are means."""
    whole_batch = Trainer(CONFIG, RunDir(tmp_path))
    halves = Trainer(replace(CONFIG, accumulate=2), RunDir(tmp_path))
    found = []
    for trainer in (whole_batch, halves):
        loss, _ = trainer.gradients(0)
        assert trainer.router_stats is not None
        found.append((loss.item(), trainer.router_stats))
    (loss, one), (other_loss, other) = found
    assert other_loss == pytest.approx(loss, abs=LOSS)
    assert other.loads() == one.loads()
    for name in ("router_entropy", "router_z_loss", "worst_load", "dead_experts"):
        assert other.row()[name] == pytest.approx(one.row()[name], abs=1e-6)


@pytest.mark.slow
def test_a_router_that_is_forced_to_collapse_raises_alarms_and_the_others_none(tmp_path):
    moe = MoEConfig(4, 1, balance_loss=0.0, router_z_loss=0.0)
    model = replace(CONFIG.model, d_model=16, d_ff=8, context=16, moe=moe)
    data = replace(CONFIG.data, batch_size=4)
    trainer = start(replace(CONFIG, model=model, data=data, steps=176, eval_every=0), tmp_path / "run")
    append = trainer.run_dir.append

    def collapse_after_ten(name, row):
        append(name, row)
        if "loss" in row and row["step"] == 10:
            favour = torch.tensor([40.0, 0.0, 0.0, 0.0])
            trainer.model.blocks[1].ffn.router.register_forward_hook(lambda _module, _args, logits: logits + favour)

    trainer.run_dir.append = collapse_after_ten
    trainer.run()
    found = {alarm.kind: alarm for alarm in trainer.log.alarms.found}
    for kind in ("dead experts", "saturated router"):
        alarm = found[kind]
        assert (alarm.where, alarm.certainty) == ("blocks.1.ffn.router", "certain")
        assert alarm.since_step == 11
        assert list(alarm.places) == ["blocks.1.ffn.router"]


# --- the command


def test_the_command_trains_reports_continues_and_evaluates(tmp_path, capsys):
    out = str(tmp_path / "run")
    small = ["--model.n_layers", "2", "--eval_sequences", "2", "--sample_tokens", "4", "--steps", "3"]
    words = ["--model.moe.top-k", "3", "--model.moe.renormalise", "true", "--placement", "sdd-released"]
    assert main(["train", "moe-nano", "--out", out, *small, *words]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert config["moe"] == {
        "n_experts": 8,
        "top_k": 3,
        "d_shared": 0,
        "renormalise": True,
        "balance_loss": 0.01,
        "router_z_loss": 0.001,
    }
    assert "8 experts, 3 a token" in capsys.readouterr().err
    assert main(["resume", out, "--steps", "4"]) == 0
    assert main(["report", out]) == 0
    assert main(["generate", out, "--prompt", "The king", "--tokens", "3"]) == 0
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 4)
    assert main(["eval", out, "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] < 9


def test_a_dense_preset_becomes_a_mixture_by_its_fields(tmp_path):
    few = ["--steps", "1", "--model.n_layers", "1", "--eval_sequences", "1", "--sample_tokens", "0"]
    words = ["--model.moe.n_experts", "2", "--model.moe.top_k", "1"]
    assert main(["train", "nano", "--out", str(tmp_path / "run"), *few, *words]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["moe"]["balance_loss"] == 0.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano", "--model.moe.top_k", "2"], "the field 'model.moe.n_experts' is missing"),
        (["moe-nano", "--model.moe.top_k", "9"], "top_k=9 must be between 1 and n_experts=8"),
        (["moe-nano", "--model.moe.n_experts", "many"], "model.moe.n_experts='many'"),
        (["moe-nano", "--model.moe.topk", "2"], "--model.moe.top_k"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err
