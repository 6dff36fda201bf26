"""A probe attached to transformers' or Lightning's Trainer finds the same numbers as in a plain loop."""

import json
import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers_probing import drawn_tokens, tiny_model
from torch import nn

import sdd

STEPS, EVERY, LR, CLIP = 6, 3, 0.1, 0.05


def microbatches(step):
    return drawn_tokens(batch=4, seed=step).chunk(2)


def plain_rows(model, *, clip_first):
    """The rows of a plain loop with two microbatches a step, plain SGD and clipping."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rows = []
    with sdd.Probe(model, optimizer, EVERY, rows.append) as probe:
        for step in range(STEPS):
            for part in microbatches(step):
                (model(part[:, :-1], part[:, 1:]) / 2).backward()
            if not clip_first:
                probe.gradients_ready()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return rows


def assert_same(rows, expected):
    assert [row["step"] for row in rows] == [1, 3, 6]
    for row, other in zip(rows, expected, strict=True):
        names = {name.removeprefix("model."): stats for name, stats in row["sites"].items()}
        assert list(names) == list(other["sites"])
        for name, stats in names.items():
            assert stats == pytest.approx(other["sites"][name], rel=1e-3), name
        for stat, values in row["layers"].items():
            assert values == pytest.approx(other["layers"][stat], rel=1e-3)


def rows_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_callback_of_transformers_sees_through_accelerate_and_goes_on_where_it_was(tmp_path):
    from sdd.probing.hf import ProbeCallback

    model = tiny_model("sdd")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    arguments, wrapped = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(optimizer=optimizer)
    callback = ProbeCallback(every=4)
    for done in (0, 7):
        state = SimpleNamespace(global_step=done)
        callback.on_train_begin(arguments, state, None, model=model, optimizer=wrapped, lr_scheduler=None)
        model(drawn_tokens(), drawn_tokens()).backward()
        optimizer.step()
        callback.on_train_end(arguments, state, None, model=model)
    assert [row["step"] for row in rows_in(tmp_path / "probe.jsonl")] == [1, 8]


@pytest.mark.slow
def test_in_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from sdd.probing.hf import ProbeCallback

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model("sdd-released")

        def forward(self, tokens):
            return {"loss": self.model(tokens[:, :-1], tokens[:, 1:])}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=CLIP,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )

    class Ordered(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    data = torch.cat([part for step in range(STEPS) for part in microbatches(step)])
    callback = ProbeCallback(EVERY)
    trainer = Ordered(Wrapped(), arguments, train_dataset=[{"tokens": row} for row in data], callbacks=[callback])
    trainer.train()
    assert_same(rows_in(tmp_path / "probe.jsonl"), plain_rows(tiny_model("sdd-released"), clip_first=True))
    assert callback.probe.done == STEPS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_in_the_trainer_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    from sdd.probing.lightning import ProbeCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_model("sdd-released")

        def training_step(self, tokens, _):
            return self.model(tokens[:, :-1], tokens[:, 1:])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=CLIP,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[ProbeCallback(EVERY)],
    )
    data = [part for step in range(STEPS) for part in microbatches(step)]
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=None))
    assert_same(rows_in(tmp_path / "probe.jsonl"), plain_rows(tiny_model("sdd-released"), clip_first=False))
