"""The result of a run as a small file. Studies commit these files; a later study adds runs and repeats none.

    OUT/results/NAME.json

It holds the config and its hash, the losses on both held-out segments, thinned curves, wall clock and versions.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch

from sdd.data import DataSource
from sdd.errors import UserError
from sdd.evals.text import load_trained
from sdd.evals.unigram import token_frequencies
from sdd.files import finite, number, write_aside
from sdd.lab.grid.job import diverged
from sdd.lab.segments import tuning_windows
from sdd.models import LanguageModel
from sdd.nn import SDDExpertLinear, SDDLinear
from sdd.report.runs import RunHistory, load_run
from sdd.train import RunConfig, config_io
from sdd.train.config import resolve
from sdd.train.evaluate import evaluate
from sdd.train.parallel import pick_autocast

#: A run has learned nothing from the context if it ends less than this share below what token frequencies reach.
LEARNED_SHARE = 0.01
_CURVE_POINTS = 60
#: The part of a run's environment that its result keeps.
_KEPT = (
    "sdd",
    "torch",
    "python",
    "platform",
    "machine",
    "device",
    "cuda",
    "precision",
    "processes",
    "stack",
    "threads",
    "cpus",
)


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run. All losses are in nats a token.

    Attributes:
        name: of its run directory.
        config_hash: of the config, see `config_hash`.
        config: complete, as in config.json, paths without their folders.
        data: fingerprint of the data.
        status: "did not converge" by the criterion of `sdd.report.runs`, or if the run ended less than `LEARNED_SHARE`
            below the loss that token frequencies reach.
        reason: why the run did not converge; empty if it did.
        step: steps done.
        tokens: tokens trained on.
        seconds: time spent in training steps.
        parameters: of the model.
        initial_loss: of the first training step.
        eval_loss: at the end, on the reporting segment, which is the one that runs evaluate on.
        bits_per_byte: the same loss in bits a byte of text; nan if unknown.
        tuning_loss: at the end, on the tuning segment; nan if the run diverged.
        token_frequencies: the loss that token frequencies alone reach on the reporting segment.
        curve: evaluations as columns `tokens`, `seconds`, `eval_loss`.
        training: training steps as columns `tokens`, `loss`, `grad_norm`, each point the mean of a stretch; results
            of earlier versions lack `grad_norm`.
        environment: versions and machine.
        measured: what the run's study measured beside losses, see `sdd.lab.measures`.
        probe: the probed steps as columns `tokens`, `eps_median`, `eps_max` (over the norms, of a norm's mean of
            eps / mean(z^2)) and, if there are SDD layers, `v_rms` and `v_angle` (medians over them of the rms of V and
            of its turn in a step, radians); results of earlier versions and of runs without a probe have none.
    """

    name: str
    config_hash: str
    config: dict[str, Any]
    data: str
    status: Literal["done", "did not converge"]
    reason: str
    step: int
    tokens: int
    seconds: float
    parameters: int
    initial_loss: float
    eval_loss: float
    bits_per_byte: float
    tuning_loss: float
    token_frequencies: float
    curve: dict[str, list[float]]
    training: dict[str, list[float]]
    environment: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, list[float]] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether tables show the loss of this run; those that did not converge are a dash."""
        return self.status == "done"

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config["seed"]

    @cached_property
    def run_config(self) -> RunConfig:
        """The config, with today's defaults for fields that did not exist when the run was made."""
        return config_io.from_dict(self.config)


class HeldOut:
    """The held-out data of a study: the tuning segment, the loss of token frequencies, and a fingerprint.

    The reporting segment is the windows that a run evaluates on itself, spread evenly over the held-out data. The
    tuning segment has as many windows, midway between those.

    Args:
        config: a run of the study; its data, context and number of windows count.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    @cached_property
    def source(self) -> DataSource:
        """The training and held-out data."""
        return resolve(self._config)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the data: results with different fingerprints cannot be compared."""
        return self.source.fingerprint()

    @cached_property
    def token_frequencies(self) -> float:
        """The loss in nats a token that token frequencies alone reach on the reporting segment."""
        return token_frequencies(self.source, self._config.eval_sequences, self._config.model.context).loss

    @cached_property
    def tuning_windows(self) -> torch.Tensor:
        """The tuning segment, int64 [n, context + 1]."""
        return tuning_windows(self.source.validation, self._config.eval_sequences, self._config.model.context)


#: Takes what a study keeps of a run beside losses: JSON values from its directory, after it has ended.
Measure = Callable[[Path, HeldOut], dict[str, Any]]


def harvest(run_dir: Path, held_out: HeldOut, measure: Measure | None = None) -> RunResult:
    """Build the result of a run that has ended, from its files and an evaluation of its last checkpoint.

    The checkpoint is evaluated on the tuning segment. What `measure` returns is kept as `measured`.
    """
    run = load_run(run_dir)
    config = config_io.load(run_dir / "config.json")
    lost = diverged(run_dir)
    reason = _why_not(run, lost, held_out.token_frequencies)
    return RunResult(
        name=run_dir.name,
        config_hash=config_hash(config),
        config=config_io.to_dict(portable(config)),
        data=held_out.fingerprint,
        status="did not converge" if reason else "done",
        reason=reason,
        step=run.step,
        tokens=run.tokens,
        seconds=round(run.seconds, 2),
        parameters=int(run.result.get("parameters") or 0),
        initial_loss=_short(run.steps["loss"][0]),
        eval_loss=math.nan if lost else _short(run.eval_loss),
        bits_per_byte=math.nan if lost else _short(run.bits_per_byte),
        tuning_loss=math.nan if lost else _short(_tuning_loss(run, run_dir, held_out)),
        token_frequencies=_short(held_out.token_frequencies),
        curve=_curve(run),
        training=_training(run),
        environment={key: run.environment[key] for key in _KEPT if run.environment.get(key) is not None},
        measured=measure(run_dir, held_out) if measure else {},
        probe=_probe(run, config),
    )


def save(result: RunResult, folder: Path) -> Path:
    """Write FOLDER/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{result.name}.json"
    write_aside(file, json.dumps(finite(asdict(result))) + "\n")
    return file


def load(file: Path) -> RunResult:
    """Read a result file.

    Raises:
        UserError: if it is damaged.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        for key in ("eval_loss", "bits_per_byte", "tuning_loss", "initial_loss"):
            values[key] = number(values[key])
        for columns in (values["curve"], values["training"], values.setdefault("probe", {})):
            columns |= {key: [number(value) for value in column] for key, column in columns.items()}
        return RunResult(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no result of a run ({error!r}): delete it, and the run is repeated") from None


def config_hash(config: RunConfig) -> str:
    """Twelve hex digits that are equal for two runs that ask for the same computation, see `portable`."""
    text = json.dumps(config_io.to_dict(portable(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def portable(config: RunConfig) -> RunConfig:
    """The config without fields that depend on the machine (threads, folders) or do not change a run."""
    data = config.data
    path = data.path and ",".join(PurePath(part).name for part in data.path.split(","))
    return replace(
        config,
        threads=0,
        probe_every=0,
        data=replace(data, path=path, tokenizer=data.tokenizer and PurePath(data.tokenizer).name),
        model=replace(config.model, placement=replace(config.model.placement, source="")),
    )


def answers(result: RunResult, asked: RunConfig) -> bool:
    """Whether a result is that of the run asked for; the vocabulary of the result may have grown to fit the data."""
    there = result.run_config
    vocabulary = max(there.model.vocab_size, asked.model.vocab_size)
    return config_hash(there) == config_hash(replace(asked, model=replace(asked.model, vocab_size=vocabulary)))


def _why_not(run: RunHistory, lost: bool, frequencies: float) -> str:
    """Why a run did not converge; empty if it did."""
    if lost or run.status != "done":
        return run.reason
    if run.eval_loss > (1 - LEARNED_SHARE) * frequencies:
        return f"ended at a held-out loss of {run.eval_loss:.3f}, token frequencies alone reach {frequencies:.3f}"
    return ""


def _tuning_loss(run: RunHistory, run_dir: Path, held_out: HeldOut) -> float:
    """The loss on the tuning segment; a stack has computed it already."""
    if (known := run.result.get("tuning_loss")) is not None:
        return number(known)
    trained = load_trained(run_dir)
    config = trained.config
    dtype = pick_autocast(config.precision, trained.model.embed.weight.device)
    eos = resolve(config).eos if config.data.document_mask else None
    rows = config.data.batch_size // config.accumulate
    return evaluate(trained.model, held_out.tuning_windows, rows, document_eos=eos, autocast_dtype=dtype).loss


def _curve(run: RunHistory) -> dict[str, list[float]]:
    kept = _spread(len(run.evals["step"]))
    seconds = np.interp(run.evals["step"], run.steps["step"], run.steps["seconds"])
    columns = {"tokens": run.evals["tokens"], "seconds": seconds, "eval_loss": run.evals["eval_loss"]}
    return {name: [_short(float(value)) for value in column[kept]] for name, column in columns.items()}


def _training(run: RunHistory) -> dict[str, list[float]]:
    steps = run.steps
    stretches = np.array_split(np.arange(len(steps["loss"])), min(_CURVE_POINTS, len(steps["loss"])))
    return {
        "tokens": [float(steps["tokens"][stretch[-1]]) for stretch in stretches],
        "loss": [_short(steps["loss"][stretch].mean()) for stretch in stretches],
        # significant digits: gradients that fade are far below one
        "grad_norm": [float(f"{steps['grad_norm'][stretch].mean():.4g}") for stretch in stretches],
    }


def _probe(run: RunHistory, config: RunConfig) -> dict[str, list[float]]:
    probe = run.probe
    if probe is None or not len(probe.steps):
        return {}
    kept = _spread(len(probe.steps))
    ratios = probe.stats["eps_ratio"][kept][:, probe.present["eps_ratio"]] if probe.has("eps_ratio") else None
    modules = LanguageModel(config.model, "meta").named_modules()
    sizes = {name: each.weight.numel() for name, each in modules if isinstance(each, SDDLinear | SDDExpertLinear)}
    columns = {"tokens": probe.steps[kept].astype(float) * config.tokens_per_step}
    if ratios is not None:
        columns |= {"eps_median": np.nanmedian(ratios, axis=1), "eps_max": np.nanmax(ratios, axis=1)}
    if sizes:
        norms, angles = (
            np.stack([probe.series(name, stat)[kept] for name in sizes]) for stat in ("weight_norm", "angle")
        )
        roots = np.sqrt(list(sizes.values()))[:, None]
        columns |= {"v_rms": np.median(norms / roots, axis=0), "v_angle": np.median(angles, axis=0)}
    return {name: [float(f"{value:.4g}") for value in column] for name, column in columns.items()}


def _spread(count: int) -> Sequence[int]:
    """At most `_CURVE_POINTS` of the places 0 to count - 1, evenly spread, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, _CURVE_POINTS)).round().astype(int).tolist()))


def _short(value: float) -> float:
    """Round to six digits after the point, which is more than a loss is good for."""
    return round(float(value), 6)
