"""What the demo's runs say: numbers, a verdict a placement by stated criteria, and sentences that follow from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdd.evals.unigram import Reference
from sdd.lab.findings import listed
from sdd.report.runs import RunHistory

#: Bits per byte. Smaller differences are not counted: the largest spread of three seeds at this size was 0.03.
NOISE = 0.03

Verdict = Literal["better", "held", "worse", "did not learn"]


@dataclass(frozen=True)
class Cell:
    """One placement under one setting.

    Attributes:
        placement: its name.
        setting: its name.
        runs: one a seed, each at its end, be it a bad one.
    """

    placement: str
    setting: str
    runs: list[RunHistory]

    @property
    def broken(self) -> int:
        """How many runs became non-finite."""
        return sum(run.result.get("status") == "failed" for run in self.runs)

    @property
    def bits_per_byte(self) -> float:
        """Held-out bits per byte, mean over the seeds; nan if a run became non-finite."""
        return self._mean([run.bits_per_byte for run in self.runs])

    @property
    def eval_loss(self) -> float:
        """Held-out loss in nats a token, likewise."""
        return self._mean([run.eval_loss for run in self.runs])

    @property
    def spread(self) -> float:
        """Largest minus smallest bits per byte of the seeds; nan for one seed."""
        values = [run.bits_per_byte for run in self.runs]
        return max(values) - min(values) if len(values) > 1 and not self.broken else math.nan

    @property
    def status(self) -> str:
        """How the runs ended."""
        if not self.broken:
            return "finished"
        return "became non-finite" if len(self.runs) == 1 else f"{self.broken} of {len(self.runs)} became non-finite"

    def _mean(self, values: list[float]) -> float:
        return math.nan if self.broken else float(np.mean(values))


@dataclass(frozen=True)
class Row:
    """One placement under both settings.

    Attributes:
        recommended, hard: its runs.
        reference: bits per byte that token frequencies alone reach.
    """

    recommended: Cell
    hard: Cell
    reference: float

    @property
    def placement(self) -> str:
        """Its name."""
        return self.hard.placement

    @property
    def change(self) -> float:
        """Bits per byte under the hard setting minus those under the recommended one."""
        return self.hard.bits_per_byte - self.recommended.bits_per_byte

    @property
    def verdict(self) -> Verdict:
        """What the hard setting did, beside the recommended one."""
        if not learned(self.hard, self.reference):
            return "did not learn"
        if not learned(self.recommended, self.reference) or self.change < -NOISE:
            return "better"
        return "worse" if self.change > NOISE else "held"


@dataclass(frozen=True)
class Results:
    """All runs of the demo.

    Attributes:
        rows: one a placement.
        reference: what token frequencies alone reach.
        seeds: number of seeds.
    """

    rows: list[Row]
    reference: Reference
    seeds: int

    @property
    def runs(self) -> list[RunHistory]:
        """Every run."""
        return [run for row in self.rows for cell in (row.recommended, row.hard) for run in cell.runs]


def learned(cell: Cell, reference: float) -> bool:
    """Whether every run stayed finite and their mean is more than `NOISE` below what token frequencies reach."""
    return cell.bits_per_byte < reference - NOISE


def collect(runs: Mapping[tuple[str, str], list[RunHistory]], reference: Reference) -> Results:
    """Order the runs, given by (placement, setting)."""
    bits = reference.bits_per_byte or math.nan
    names = dict.fromkeys(placement for placement, _ in runs)
    rows = [
        Row(*(Cell(name, setting, runs[name, setting]) for setting in ("recommended", "hard")), reference=bits)
        for name in names
    ]
    return Results(rows, reference, seeds=len(rows[0].hard.runs))


def conclusions(results: Results) -> list[str]:
    """What follows from the numbers, whichever way it goes."""
    return [_answer(results.rows), *_on_hard(results), _on_recommended(results), _limits(results)]


def _answer(rows: Sequence[Row]) -> str:
    """The question of the page: Post-Norm against the same wiring with SDD."""
    by_name = {row.placement: row for row in rows}
    sdd, post = by_name["sdd"], by_name["postnorm"]
    match post.verdict == "did not learn", sdd.verdict == "did not learn":
        case True, True:
            return "Under the hard setting Post-Norm breaks, and with SDD it breaks as well."
        case True, False:
            return "Under the hard setting Post-Norm breaks, and the same wiring with SDD does not."
        case False, True:
            return "Under the hard setting Post-Norm does not break, and the same wiring with SDD does."
        case _:
            compared = _compared(post.hard.bits_per_byte - sdd.hard.bits_per_byte)
            return f"Under the hard setting Post-Norm does not break; with SDD it is {compared}."


def _on_hard(results: Results) -> list[str]:
    texts: list[str] = []
    failed = [row for row in results.rows if row.verdict == "did not learn"]
    if failed:
        parts = [f"{row.placement} ({_how(row.hard)})" for row in failed]
        texts.append(
            f"Under it {listed(parts)} did not learn: token frequencies alone reach {results.rows[0].reference:.2f}."
        )
    rest = [row for row in results.rows if row not in failed]
    if rest:
        parts = [f"{row.placement} {_beside_recommended(row)}" for row in rest]
        texts.append(f"Compared with its own recommended run, {listed(parts)}.")
    if len(rest) > 1:
        ranking = _ranking([row.hard for row in rest])
        texts.append(f"Of those that learn under the hard setting, {ranking}")
    return texts


def _on_recommended(results: Results) -> str:
    cells = [row.recommended for row in results.rows]
    failed = [cell.placement for cell in cells if not learned(cell, results.rows[0].reference)]
    start = "Under the recommended setting "
    if failed:
        return f"{start}{listed(failed)} did not learn; {_ranking([c for c in cells if c.placement not in failed])}"
    return f"{start}every placement learns; {_ranking(cells)}"


def _limits(results: Results) -> str:
    runs = results.runs
    seeds = "one seed" if results.seeds == 1 else f"{results.seeds} seeds"
    parameters = max((run.result.get("parameters") or 0 for run in runs), default=0)
    tokens = max((run.tokens for run in runs), default=0)
    return (
        f"This is {seeds}, {parameters / 1e6:.1f} million parameters and {tokens:,} tokens a run. All placements share "
        "the learning rate, which nobody tuned for any of them, so which is best at its own best rate is not answered "
        "here, nor what happens at larger size."
    )


def _ranking(cells: Sequence[Cell]) -> str:
    if not cells:
        return "none is left to compare."
    cells = sorted(cells, key=lambda cell: cell.bits_per_byte)
    best = cells[0]
    text = ", ".join(f"{cell.placement} {'reaches ' * (cell is best)}{cell.bits_per_byte:.2f}" for cell in cells)
    close = [cell.placement for cell in cells[1:] if cell.bits_per_byte - best.bits_per_byte <= NOISE]
    if close:
        text += f"; {listed([best.placement, *close])} are closer than {NOISE:g}, which is not told apart here"
    return text + "."


def _beside_recommended(row: Row) -> str:
    if not learned(row.recommended, row.reference):
        return "learns where that did not"
    if row.verdict == "held":
        return "holds"
    return f"is {abs(row.change):.2f} bits per byte {row.verdict}"


def _how(cell: Cell) -> str:
    return cell.status if cell.broken else f"{cell.bits_per_byte:.2f} bits per byte"


def _compared(ahead: float) -> str:
    if abs(ahead) <= NOISE:
        return f"neither better nor worse by more than {NOISE:g} bits per byte"
    return f"{abs(ahead):.2f} bits per byte {'better' if ahead > 0 else 'worse'}"


def as_dict(results: Results) -> dict[str, Any]:
    """Every number of the page, as results.json holds it; JSON has no nan, so they are None."""
    return {
        "seeds": results.seeds,
        "token_frequencies": {
            "loss": results.reference.loss,
            "bits_per_byte": results.reference.bits_per_byte,
        },
        "noise": NOISE,
        "placements": [_row(row) for row in results.rows],
        "conclusions": conclusions(results),
        "runs": [_run(run) for run in results.runs],
    }


def _row(row: Row) -> dict[str, Any]:
    cells = {
        cell.setting: {
            "bits_per_byte": _plain(cell.bits_per_byte),
            "eval_loss": _plain(cell.eval_loss),
            "spread": _plain(cell.spread),
            "status": cell.status,
        }
        for cell in (row.recommended, row.hard)
    }
    return {"placement": row.placement, **cells, "change": _plain(row.change), "verdict": row.verdict}


def _run(run: RunHistory) -> dict[str, Any]:
    curve = zip(run.evals["tokens"], run.evals["eval_loss"], run.evals["eval_bits_per_byte"], strict=True)
    return {
        "name": run.path.name,
        "placement": run.placement,
        "lr": run.config.get("optim.lr"),
        "warmup": run.config.get("optim.warmup"),
        "seed": run.config.get("seed"),
        "status": run.result.get("status"),
        "step": run.step,
        "tokens": run.tokens,
        "seconds": _plain(run.seconds),
        "eval_loss": _plain(run.eval_loss),
        "bits_per_byte": _plain(run.bits_per_byte),
        "curve": [dict(zip(("tokens", "loss", "bits_per_byte"), map(_plain, point), strict=True)) for point in curve],
        "environment": run.environment,
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
