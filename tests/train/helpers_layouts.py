"""What several processes that share a model are asked for, to compare it with one process."""

import json
from dataclasses import replace

import pytest
import torch
from helpers_train import TINY, rows

from sdd.files import read_json_lines
from sdd.placement import placements
from sdd.train.optim import optimizer_tensors
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, reopen, start

# widths that 2 and 4 divide and 8 does not, four heads that share keys in pairs, and a batch that clips
CONFIG = replace(
    TINY,
    model=replace(TINY.model, d_ff=52, n_heads=4, n_kv_heads=2, vocab_size=4099),
    data=replace(TINY.data, batch_size=8),
    optim=replace(TINY.optim, grad_clip=0.5),
    accumulate=2,
)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def of_placement(name, **changes):
    return replace(CONFIG, model=replace(CONFIG.model, placement=placements[name]), **changes)


def end_documents(trainer):
    """Where documents are masked, let a frequent token end them: so little text has not one real end."""
    if trainer.config.data.document_mask:
        trainer._document_eos = 285  # the most frequent token of the first batch


def gradients(world, configs, dtypes, out):
    """Of each config and in each precision: held-out loss, loss and gradients of a step."""
    found = {}
    for name, config in configs.items():
        for dtype in dtypes:
            trainer = Trainer(config, RunDir(out), world=world)
            end_documents(trainer)
            trainer.model.to(dtype)
            found[name, dtype, "held-out loss"] = trainer.evaluate().loss
            found[name, dtype, "loss"] = trainer.backward(0).item()
            for key, parameter in trainer.model.named_parameters():
                assert parameter.dtype == dtype
                found[name, dtype, key] = whole(parameter.grad).numpy()
    return found


def assert_same_gradients(ours, alone):
    """What `gradients` found in one of several processes is what one process alone found."""
    assert ours.keys() == alone.keys()
    for (name, dtype, what), value in alone.items():
        expected, found = torch.as_tensor(value), torch.as_tensor(ours[name, dtype, what])
        rel = 1e-10 if dtype == torch.float64 and what != "loss" else 1e-5  # the loss of a step is float32
        assert (found - expected).norm() <= rel * expected.norm(), (name, dtype, what)


def everything(trainer):
    """Parameters and optimiser state by name, whole."""
    named = {f"model.{name}": whole(parameter) for name, parameter in trainer.model.named_parameters()}
    state = {f"optimizer.{name}": whole(tensor) for name, tensor in optimizer_tensors(trainer.optimizer).items()}
    return {name: tensor.numpy() for name, tensor in (named | state).items()}


def train(world, config, out):
    trainer = start(config, out, world)
    end_documents(trainer)
    trainer.run()
    return everything(trainer)


RUN = replace(CONFIG, steps=8, eval_every=4, checkpoint_every=4, eval_sequences=9, probe_every=4, sample_tokens=9)


def leaves(value, name=""):
    """The numbers in a row of the probe, by name."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in leaves(inner, f"{name}.{part}").items()}
    return {name: value}


def assert_same_run(run, alone):
    """Rows, text and probe of a run are those that one process writes."""
    for ours, theirs in zip(rows(run), rows(alone), strict=True):
        assert leaves(ours).keys() == leaves(theirs).keys()
        for name, value in leaves(ours).items():
            near = 1e-5 if name.count(".") == 1 else 2e-3  # those by layer have three decimals
            assert value == pytest.approx(leaves(theirs)[name], rel=5e-5, abs=near), name
    assert_same_text_and_probe(run, alone)


def assert_same_text_and_probe(run, alone):
    """The text that a run writes and the rows of its probe are those of one process."""
    samples = [json.loads((each / "samples.jsonl").read_text()) for each in (run, alone)]
    assert samples[0] == samples[1], "text is written in one token at a time, which no processes share"
    ours, theirs = (list(read_json_lines(each / "probe.jsonl")) for each in (run, alone))
    assert len(ours) == len(theirs) > 2
    for one, other in zip(map(leaves, ours), map(leaves, theirs), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-7), name


def stopped_and_resumed(world, config, out):
    """A run that is reopened at step 4, and what it has at the end."""
    trainer = start(config, out, world)
    while trainer.step < 4:
        trainer.train_step(trainer.step)
        trainer.step += 1
    trainer.save()
    trainer.run_dir.unlock()
    torch.manual_seed(7)
    again = reopen(out, world=world)
    assert again.step == 4
    while again.step < 8:
        again.train_step(again.step)
        again.step += 1
    again.run_dir.unlock()
    return everything(again)


def unbroken(world, config, out):
    trainer = Trainer(config, RunDir(out), world=world)
    for step in range(8):
        trainer.train_step(step)
    return everything(trainer)


def saved_by(world, config, out):
    trainer = start(config, out, world)
    for step in range(2):
        trainer.train_step(step)
        trainer.step += 1
    trainer.save()
    trainer.run_dir.unlock()
    return everything(trainer)


def loaded_and_saved(world, out, parallel):
    trainer = reopen(out, world=world, parallel=parallel)
    found = everything(trainer)
    trainer.train_step(trainer.step)
    trainer.step += 1
    trainer.save()
    trainer.run_dir.unlock()
    return found, everything(trainer)
