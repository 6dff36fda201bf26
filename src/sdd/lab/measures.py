"""What studies keep of a run beside its losses: small JSON values, taken from its directory when it has ended."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdd.evals.requests import TABLE_1, Task, load_task
from sdd.evals.scorer import RunScorer
from sdd.evals.tasks import run_tasks
from sdd.evals.text import load_trained
from sdd.files import number
from sdd.lab.grid.job import diverged
from sdd.lab.results import HeldOut, RunResult
from sdd.models import LanguageModel
from sdd.probing import ProbeHistory
from sdd.report.runs import load_run
from sdd.train import config_io

#: The groups of figure 7 of arXiv 2502.15499, as the authors' code names its matrices, by ours.
GROUPS = {
    "att_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn_out": ("attn.o_proj",),
    "ff_proj": ("ffn.gate_proj", "ffn.up_proj"),
    "ff_out": ("ffn.down_proj",),
}
#: The parts of a run at whose ends gradients are kept, beside its first step.
SHARES = (0.1, 0.5, 1.0)
_WINDOWS = 16  # of held-out text whose features are compared
_DIGITS = 4
#: So many documents of each task of table 1 are asked: the first ones; of MMLU, one of each subject in turn.
TASK_DOCUMENTS = 500
_OF_TASK = ("documents", "chance", "bits_per_byte", "cut")


def training_losses(run: Path, _: HeldOut) -> dict[str, Any]:
    """`losses`: the training loss of every step, nats a token."""
    return {"losses": [_short(loss) for loss in load_run(run).steps["loss"]]}


def stream_gradients(run: Path, _: HeldOut) -> dict[str, Any]:
    """`steps`, and for each `grad_rms`: of the loss gradient by the residual stream, from layer to layer.

    The stream has L+1 layers: the input of the first block and the output of each.
    """
    probe = load_run(run).probe
    if probe is None:
        return {}
    rows = _kept_rows(probe)
    return {
        "steps": [int(probe.steps[row]) for row in rows],
        "grad_rms": [[_short(value) for value in probe.layers["grad_rms"][row]] for row in rows],
    }


def group_gradients(run: Path, _: HeldOut) -> dict[str, Any]:
    """`steps`, and for each the gradient norm of every group of matrices of `GROUPS` in every block.

    The norm is that of all the entries of the group's gradients before clipping, by group under `norms`: `[S][L]`.
    """
    probe, config = load_run(run).probe, config_io.load(run / "config.json").model
    if probe is None:
        return {}
    sizes = {name: weight.numel() for name, weight in LanguageModel(config, "meta").named_parameters()}
    rows = _kept_rows(probe)

    def norm(row: int, block: int, matrices: Sequence[str]) -> float:
        sites = [f"blocks.{block}.{matrix}" for matrix in matrices]
        squares = [probe.series(site, "weight_grad_rms")[row] ** 2 * sizes[f"{site}.weight"] for site in sites]
        return _short(math.sqrt(sum(squares)))

    return {
        "steps": [int(probe.steps[row]) for row in rows],
        "norms": {
            group: [[norm(row, block, matrices) for block in range(config.n_layers)] for row in rows]
            for group, matrices in GROUPS.items()
        },
    }


def layer_similarity(run: Path, held_out: HeldOut) -> dict[str, Any]:
    """Mean cosine over tokens of held-out text between every two layers of the trained model, nothing if it diverged.

    `outputs` `[L+1][L+1]` compares the residual stream: the input of the first block and the output of each. `updates`
    `[L][L]` compares what the blocks change, the output of a block minus its input.
    """
    if diverged(run):
        return {}
    model = load_trained(run).model
    stream = _stream(model, held_out.tuning_windows[:_WINDOWS, :-1])
    changes = [after - before for before, after in pairwise(stream)]
    return {"outputs": _cosines(stream), "updates": _cosines(changes)}


def gradients_and_similarity(run: Path, held_out: HeldOut) -> dict[str, Any]:
    """What `group_gradients` and `layer_similarity` return: the studies that read them share their runs."""
    return {**group_gradients(run, held_out), **layer_similarity(run, held_out)}


def downstream_tasks(run: Path, _: HeldOut) -> dict[str, Any]:
    """`tasks`: of each task of table 1 its accuracy beside what it costs to know nothing; nothing if the run diverged.

    By task: `accuracy` (the one that the task's authors report) and its `stderr`; `documents`, `chance`,
    `bits_per_byte` and `cut` of `sdd.evals.accuracy.summarise`; `shortest`, the accuracy of always giving the shortest
    answer. Scores are kept in the run's folder.
    """
    if diverged(run):
        return {}
    trained = load_trained(run)
    tasks = [load_task(name, limit=TASK_DOCUMENTS) for name in TABLE_1]
    found = run_tasks(RunScorer(trained), tasks, run / "evals" / f"step-{trained.step:08d}")
    return {"tasks": {task.name: _of_task(task, found[task.name]) for task in tasks}}


def require_tasks() -> None:
    """Raise UserError, which says how to get it, if a task of table 1 is not there."""
    for name in TABLE_1:
        load_task(name, limit=1)


def numbers(result: RunResult, *names: str) -> Any:
    """A value of `measured` by its path of names, with numbers as floats at any depth; None if the run has none."""
    value: Any = result.measured
    for name in names:
        if name not in value:
            return None
        value = value[name]
    return _floats(value)


def _floats(value: Any) -> Any:
    return [_floats(each) for each in value] if isinstance(value, list) else number(value)


def _of_task(task: Task, found: dict[str, Any]) -> dict[str, Any]:
    primary = found["primary"]
    hits = [
        min(range(len(document.choices)), key=lambda at: len(document.choices[at][1])) == document.label
        for document in task.documents
    ]
    values = {name: found[name] for name in _OF_TASK} | {
        "accuracy": found[primary],
        "stderr": found[f"{primary}_stderr"],
    }
    return {name: round(value, 6) for name, value in {**values, "shortest": sum(hits) / len(hits)}.items()}


def _kept_rows(probe: ProbeHistory) -> list[int]:
    """The first probed row, and those nearest to `SHARES` of the last step."""
    steps = probe.steps.tolist()
    wanted = [1, *(share * steps[-1] for share in SHARES)]
    return sorted({min(range(len(steps)), key=lambda row: abs(steps[row] - step)) for step in wanted})


@torch.no_grad()
def _stream(model: LanguageModel, tokens_BT: Tensor) -> list[Tensor]:
    """The residual stream before the first block and after each, float32 `[B * T, C]`."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, output: Any) -> None:
        taken = [] if found else [args[0]]
        found.extend(x.float().flatten(0, 1) for x in (*taken, output[0]))

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        model(tokens_BT.to(model.embed.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _cosines(features: Sequence[Tensor]) -> list[list[float]]:
    units = [nn.functional.normalize(x, dim=-1) for x in features]
    return [[round(float((a * b).sum(-1).mean()), _DIGITS) for b in units] for a in units]


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.{_DIGITS}g}")
