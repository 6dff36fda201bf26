"""The study `lr`: how much the final loss depends on the learning rate, by the measure of arXiv 2309.14322."""

import math
from collections.abc import Iterator, Mapping

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Cell, Definition, Outcome, best_rate
from sdd.lab.findings import Findings, Interval, Measured, Picture, Table, described, listed, seeds_text
from sdd.lab.results import RunResult
from sdd.lab.statistics import lr_sensitivity, paired_difference
from sdd.lab.studies import shared

#: Two decades around the base rate, seven rates.
FACTORS = tuple(10 ** (step / 3) for step in range(-3, 4))

#: The cells of one method by learning rate, ascending.
Grid = Mapping[float, Cell]
#: Numbers of each method by seed.
Numbers = Mapping[str, Mapping[int, float]]


def read(outcome: Outcome) -> Findings:
    """Sensitivity and best loss of each method over one grid of rates."""
    grids = {arm.name: outcome.grids[arm.name, DEFAULT.name] for arm in outcome.plan.arms}
    sensitivity = {name: sensitivities(grid) for name, grid in grids.items()}
    best = {name: best_losses(grid) for name, grid in grids.items()}
    return Findings(
        answer=_answer(sensitivity),
        conclusions=[
            *_beside_reference("sensitivity", sensitivity, shared.ours(outcome)),
            *_beside_reference("loss at its best rate", best, shared.ours(outcome)),
            *_breaking(grids),
        ],
        limits=[
            *shared.edge_limits(outcome),
            "The measure depends on the range: all methods share one, which the best rate of none may end.",
            "The measure is relative to a method's own best: one that learns little at any rate, or fails at most of "
            "them, comes out insensitive. It says something only beside the losses, and of a run so short that low "
            "rates learn nothing, mostly how far a method gets at all.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            _summary(outcome, grids, sensitivity, best),
            _loss_table(grids),
            shared.cost_table([grid[best_rate(grid)] for grid in grids.values()], outcome),
        ],
        pictures=[_picture(outcome, grids)],
    )


def by_seed(grid: Grid) -> Iterator[tuple[int, list[RunResult]]]:
    """Each seed with its runs, one for each rate."""
    for runs in zip(*(cell.results for cell in grid.values()), strict=True):
        yield runs[0].seed, list(runs)


def sensitivities(grid: Grid) -> dict[int, float]:
    """Learning-rate sensitivity by seed: the mean over the rates of min(final, initial loss) - best final loss."""
    # The loss of every run that stayed finite counts, whether or not the run converged.
    return {seed: lr_sensitivity([run.eval_loss for run in runs], runs[0].initial_loss) for seed, runs in by_seed(grid)}


def best_losses(grid: Grid) -> dict[int, float]:
    """Reported loss by seed, each at the rate that is best on the tuning segment for the other seeds.

    So no loss is reported on the text and the seed that its rate was chosen on. With one seed it is the rate of that
    seed.
    """
    found: dict[int, float] = {}
    for seed, _ in by_seed(grid):
        others = {rate: _without(cell, seed) if len(cell.results) > 1 else cell for rate, cell in grid.items()}
        found[seed] = grid[best_rate(others)].losses[seed]
    return found


def _without(cell: Cell, seed: int) -> Cell:
    return Cell(cell.arm, cell.condition, cell.rate, tuple(result for result in cell.results if result.seed != seed))


def _summary(outcome: Outcome, grids: Mapping[str, Grid], sensitivity: Numbers, best: Numbers) -> Table:
    rates = list(next(iter(grids.values())))
    ours = shared.ours(outcome)
    reference = sensitivity.get(ours)
    rows = []
    for name, grid in grids.items():
        trained = [rate for rate, cell in grid.items() if not cell.failed]
        other = Interval(paired_difference(sensitivity[name], reference), signed=True) if reference else "-"
        rows.append(
            [
                name,
                Measured(sensitivity[name]),
                "" if name == ours else other,
                f"{best_rate(grid):g}",
                Measured(best[name]),
                f"{max(trained):g}" if trained else "-",
            ]
        )
    return Table(
        "sensitivity",
        f"Learning-rate sensitivity over {rates[0]:g} to {rates[-1]:g}, nats a token, "
        f"{seeds_text(outcome.plan.request.seeds)}",
        [
            "method",
            "LR sensitivity",
            f"minus that of {ours}",
            "best rate",
            "loss at the best rate",
            "highest rate",
        ],
        rows,
        "Sensitivity: mean over the rates of min(final, initial loss) minus the best final loss (arXiv 2309.14322); "
        "lower is less sensitive. Loss at the best rate: each seed at the rate that was best for the others on the "
        "tuning segment. Highest rate: at which every seed converged. ± is half of Student's 95% interval, "
        "differences paired by seed.",
    )


def _loss_table(grids: Mapping[str, Grid]) -> Table:
    return Table(
        "loss",
        "Held-out loss at the end by learning rate, nats a token",
        ["method", *(f"{rate:g}" for rate in next(iter(grids.values())))],
        [[name, *(Measured(cell.losses) for cell in grid.values())] for name, grid in grids.items()],
        shared.not_converged_text(),
    )


def _answer(sensitivity: Numbers) -> str:
    ranked = sorted(sensitivity, key=lambda name: Measured(sensitivity[name]).estimate.value)
    numbers = ", ".join(f"{name} {Measured(sensitivity[name])}" for name in ranked)
    return f"From the least sensitive to the most: {numbers} (nats a token)."


def _beside_reference(what: str, numbers: Numbers, reference: str) -> list[str]:
    """One sentence on which methods lie above and below the reference; none if there is nothing to compare."""
    if reference not in numbers or len(numbers) == 1:
        return []
    sides: dict[str, list[str]] = {"higher than": [], "lower than": [], "not told apart from": []}
    for name in numbers:
        if name != reference:
            change = paired_difference(numbers[name], numbers[reference])
            side = "higher than" if change.value > 0 else "lower than"
            sides[side if change.excludes(0) else "not told apart from"].append(name)
    parts = [f"{side} {reference}'s for {listed(names)}" for side, names in sides.items() if names]
    return [f"The {what} is {', '.join(parts)} (95% intervals of paired differences)."]


def _breaking(grids: Mapping[str, Grid]) -> list[str]:
    broken = {name: [f"{rate:g}" for rate, cell in grid.items() if cell.broken] for name, grid in grids.items()}
    return [f"{name}: most seeds do not converge at {', '.join(rates)}." for name, rates in broken.items() if rates]


def _picture(outcome: Outcome, grids: Mapping[str, Grid]) -> Picture:
    words = {
        name: [f"{Measured(cell.losses)} at {rate:g}" for rate, cell in grid.items()] for name, grid in grids.items()
    }

    def draw():
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, style_of

        curves: list[Curve] = []
        for arm in outcome.plan.arms:
            losses = [[_drawn(run) for run in runs] for _, runs in by_seed(grids[arm.name])]
            curves.append(Curve(arm.name, style_of(arm.name, arm.placement), [list(grids[arm.name])], losses))
        axes = (Axis("peak learning rate", log=True), shared.HELD_OUT.axis())
        initial = [run.initial_loss for run in outcome.results]
        start = {"before training": sum(initial) / len(initial)}
        return draw_curves([CurvePanel("", *axes, curves, levels=start)], columns=1)

    caption = (
        f"Held-out loss at the end against the peak learning rate, mean of {seeds_text(outcome.plan.request.seeds)}, "
        "the band their range; a run that diverged stands at the loss before training, as the measure counts it."
    )
    return Picture("lr", caption, f"Held-out loss in nats a token by learning rate. {described(words)}", draw)


def _drawn(run: RunResult) -> float:
    return min(run.eval_loss, run.initial_loss) if math.isfinite(run.eval_loss) else run.initial_loss


DEFINITION = Definition(
    name="lr",
    title="How much does the learning rate matter?",
    question="does SDD depend less on the learning rate than other placements of the norms?",
    method=(
        "Every method is trained at the same rates, evenly spaced in their logarithm over two decades or more, with "
        "the same data in the same order, warm-up and schedule.",
        "LR sensitivity is the mean over the rates of how far the final loss, at most the initial one, lies above "
        "the method's best (Wortsman et al., arXiv 2309.14322).",
        "If the best rate of a method lies at an end of the grid, the grid is extended for all of them.",
    ),
    arms=tuple(
        Arm(name, name) for name in ("sdd", "sdd-released", "prenorm-qk", "olmo2", "postnorm", "deepnorm", "peri")
    ),
    conditions=(DEFAULT,),
    rates=Rates("sweep", FACTORS),
    # The page shows no curves, so four evaluations are enough: they tell a run that fell back from one that did not.
    sizes={"nano": {"steps": 160, "optim.warmup": 16, "eval_every": 40}},
    read=read,
)
