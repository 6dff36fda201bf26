"""Weight decay of alphas in the Trainer of transformers: kept away by a mixin, seen by a callback."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import transformers

from sdd import SDDLinear
from sdd.interop.huggingface import AlphaDecayCallback, UndecayedAlphas


class Undecayed(UndecayedAlphas, transformers.Trainer):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = SDDLinear(4, 8, group=4), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(self.first(x)).square().mean()}


def trainer(cls: Any, folder: Path) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return cls(Model(), arguments, train_dataset=[{"x": torch.ones(4)}] * 8, callbacks=[AlphaDecayCallback()])


def test_the_callback_warns_of_what_the_trainer_decays(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"decays 1 alphas of SDD layers, such as first\.alpha"):
        trainer(transformers.Trainer, tmp_path).train()


def test_the_mixin_keeps_decay_from_alphas_alone(tmp_path: Path) -> None:
    undecayed, plain = trainer(Undecayed, tmp_path), trainer(transformers.Trainer, tmp_path)
    names, all_names = (one.get_decay_parameter_names(one.model) for one in (undecayed, plain))
    assert sorted({*names, "first.alpha"}) == sorted(all_names)
    assert "first.alpha" not in names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undecayed.train()
