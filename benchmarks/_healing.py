"""Calibrate a pretrained language model to SDD and train it on: data, arms, and a run that can be resumed."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdd
from sdd.conversion.calibrate import Norms, fit_alphas
from sdd.conversion.trained import calibrated
from sdd.data import Tokenizer, classics
from sdd.errors import UserError
from sdd.files import aside, write_aside
from sdd.interop.library import library
from sdd.norm_groups import resolve_group
from sdd.terminal import clock


@dataclass(frozen=True)
class Arm:
    """What is converted before the training.

    Attributes:
        label: in table and picture.
        include: patterns of the layers to calibrate; none for the unconverted model.
        eps: of the norms at the start, over the median mean square of each layer's outputs; 0 for 1e-6 throughout.
        rate_of: the arm whose rate is used; "" to try all rates.
    """

    label: str
    include: tuple[str, ...] = ()
    eps: float = 0.0
    rate_of: str = ""


ARMS: Mapping[str, Arm] = {
    "plain": Arm("not converted"),
    "o+up": Arm("o and up", ("o_proj", "up_proj")),
    "all": Arm("all layers", ("*_proj",)),
    "all-eps": Arm("all layers, falling eps", ("*_proj",), eps=10.0, rate_of="all"),
}


@dataclass(frozen=True)
class Settings:
    """The sizes of the study, the same for all arms; lengths are predictions of a window."""

    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    tuning_steps: int = 30
    steps: int = 300
    warmup: int = 10
    decay_from: int = 200
    batch: int = 1
    length: int = 128
    calibration_windows: int = 16
    tuning_windows: int = 16
    heldout_windows: int = 64
    heldout_length: int = 128
    curve_every: int = 20
    save_every: int = 100

    def rate_factor(self, step: int) -> float:
        """The rate of step 0, 1, ... over its peak: warm-up, constant, linear to zero."""
        last = (self.steps - step) / (self.steps - self.decay_from)
        return min(1.0, (step + 1) / self.warmup, last)

    def eps_at(self, start: float, step: int) -> float:
        """Eps over the mean square before a step: from `start` by equal ratios to a thousandth where decay begins."""
        return start * (1e-3 / start) ** min(1.0, step / self.decay_from)


class Data:
    """Windows of the classics: the training batches in order, calibration, tuning and held-out ones."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        train, validation = classics(Tokenizer.load(folder / "tokenizer.json"), print)
        draw = np.random.default_rng(0)
        n, length = settings.calibration_windows, settings.heldout_length + 1
        self.calibration = _windows(train, draw.integers(len(train) - length, size=n), length - 1)
        many = settings.steps * settings.batch
        starts = draw.integers(len(train) - settings.length - 1, size=many)
        self.batches = _windows(train, starts, settings.length + 1).split(settings.batch)
        count = settings.heldout_windows + settings.tuning_windows
        spaced = _windows(validation, np.linspace(0, len(validation) - length, count).astype(int), length)
        tuning = torch.zeros(count, dtype=torch.bool)
        tuning[:: count // settings.tuning_windows] = True
        self.tuning, self.heldout = spaced[tuning], spaced[~tuning]


def _windows(file: Any, starts: np.ndarray, length: int) -> Tensor:
    return torch.from_numpy(np.asarray(file.read(starts, length)).astype(np.int64))


def load(folder: Path) -> Any:
    """The model in a folder that transformers wrote.

    Raises:
        UserError: if there is none.
    """
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder}: no {missing[0]}: give the folder that save_pretrained wrote of model and tokenizer")
    with library("./dev bench smollm2") as transformers:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def layers(model: nn.Module, arm: Arm) -> list[nn.Module]:
    """The layers that an arm converts."""
    return [
        module
        for name, module in model.named_modules()
        if any(fnmatch(name.rpartition(".")[2], pattern) for pattern in arm.include)
    ]


@torch.no_grad()
def token_losses(model: Any, windows: Tensor) -> np.ndarray:
    """The loss in nats of each token but the first, `[windows, length - 1]`."""
    found = []
    for rows in windows.split(4):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        found.append(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1))
    return torch.cat(found).numpy()


def paired(losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The mean difference of two models' losses on the same windows, and its standard error over windows."""
    gaps = (losses - others).mean(1)
    return float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))


class Falling:
    """Norms whose eps falls while the model trains; alpha takes up the change for a token of median scale."""

    def __init__(self, squares: Mapping[sdd.SDDLinear, float], settings: Settings, start: float) -> None:
        self._squares, self._settings, self._start = squares, settings, start

    def resume(self, steps: int) -> None:
        """Set eps as it was when a run had taken so many steps."""
        for layer, square in self._squares.items():
            layer.eps = self._settings.eps_at(self._start, steps - 1) * square

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Set eps for a step, and scale alpha."""
        ratio = self._settings.eps_at(self._start, step)
        for layer, square in self._squares.items():
            layer.alpha.mul_(math.sqrt((1 + ratio) / (1 + layer.eps / square)))
            layer.eps = ratio * square


def convert(model: Any, arm: Arm, data: Data, settings: Settings) -> Falling | None:
    """Calibrate the layers of an arm."""
    if not arm.include:
        return None
    batches = [{"input_ids": data.calibration, "use_cache": False}]
    if not arm.eps:
        sdd.convert(model, list(arm.include), mode="calibrate", batches=batches)
        return None
    seen = sdd.convert(model, list(arm.include), mode="observe", batches=batches).observed
    squares = {layer.name: layer.rms**2 for layer in seen}
    linears = {name: model.get_submodule(name) for name in squares}
    norms = {n: Norms(resolve_group(None, linears[n].out_features), arm.eps * square) for n, square in squares.items()}
    fits = fit_alphas(model, linears, norms, batches)
    made = {calibrated(linear, norms[name], fits[name]): squares[name] for name, linear in linears.items()}
    return Falling(made, settings, arm.eps)


class Run:
    """One arm at one rate, in a folder of its own: result.json, losses of the held-out tokens, a checkpoint."""

    def __init__(self, work: Path, folder: Path, name: str, rate: float, data: Data, settings: Settings) -> None:
        self.path = work / f"{name}-{rate:g}"
        self.path.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, Any] = {"arm": name, "rate": rate, "steps": 0, "curve": []}
        if self._result.exists():
            self.values = json.loads(self._result.read_text(encoding="utf-8"))
        self.settings, self.rate, self._data, self._folder, self._arm = settings, rate, data, folder, ARMS[name]
        self._model: Any = None
        self._optimizer: Any = None

    def to(self, step: int, note: Callable[[str], None]) -> None:
        """Train up to a step, if the run is not that far."""
        if self.values["steps"] >= step:
            return
        self._open()
        begun, first = time.monotonic(), self.values["steps"]
        for index in range(first, step):
            self._step(index)
            done = index + 1
            if done % self.settings.curve_every == 0 or done == step:
                self._measure(done)
                left = (time.monotonic() - begun) / (done - first) * (step - done)
                note(f"{self.path.name}: {done} of {step}, loss {self.values['curve'][-1][1]:.3f}, {clock(left)} left")
            if done % self.settings.save_every == 0 or done == step:
                self._save(done)

    def close(self, *, forget: bool = False) -> None:
        """Free the memory, and the disk if the run will not go on."""
        self._model, self._optimizer = None, None
        if forget:
            self._checkpoint.unlink(missing_ok=True)

    @property
    def tuned(self) -> float:
        """The loss on the tuning windows after the tuning steps; inf if they were not a stop."""
        return dict(self.values["curve"]).get(self.settings.tuning_steps, math.inf)

    def losses(self, step: int) -> np.ndarray:
        """The losses of the held-out tokens before training (0), the same for all rates, or after so many steps."""
        return np.load(self._heldout_file(step))

    def _heldout_file(self, step: int) -> Path:
        return (self.path if step else self.path.parent) / f"{self.values['arm']}-heldout-{step}.npy"

    @property
    def _result(self) -> Path:
        return self.path / "result.json"

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    def _open(self) -> None:
        if self._model is not None:
            return
        self._model = load(self._folder)
        self._falling = convert(self._model, self._arm, self._data, self.settings)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        if self._checkpoint.exists() and self.values["steps"]:
            saved = torch.load(self._checkpoint, weights_only=True)
            self._model.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self.values = saved["values"]
            if self._falling:
                self._falling.resume(self.values["steps"])
        else:
            self.values |= {"steps": 0, "curve": []}
            self._measure(0)
            self._heldout(0)

    def _step(self, index: int) -> None:
        begun = time.process_time()
        if self._falling:
            self._falling.before(index)
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate * self.settings.rate_factor(index)
        rows = self._data.batches[index]
        logits = self._model(input_ids=rows[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.values["cpu_seconds"] = round(self.values.get("cpu_seconds", 0) + time.process_time() - begun, 1)

    def _measure(self, step: int) -> None:
        self._model.eval()
        self.values["curve"].append([step, round(float(token_losses(self._model, self._data.tuning).mean()), 4)])
        self._model.train()

    def _heldout(self, step: int) -> None:
        if self._heldout_file(step).exists():
            return
        self._model.eval()
        with aside(self._heldout_file(step)) as path, path.open("wb") as file:
            np.save(file, token_losses(self._model, self._data.heldout))
        self._model.train()

    def _save(self, step: int) -> None:
        self.values["steps"] = step
        if step == self.settings.steps:
            self._heldout(step)
            self._checkpoint.unlink(missing_ok=True)
        else:
            state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
            with aside(self._checkpoint) as path:
                torch.save({**state, "values": self.values}, path)
        write_aside(self._result, json.dumps(self.values))
