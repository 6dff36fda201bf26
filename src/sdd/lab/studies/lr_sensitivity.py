"""The study `lr`: how much the final loss depends on the learning rate, by the measure of arXiv 2309.14322."""

import math
from collections.abc import Mapping

from sdd.lab.definition import DEFAULT, Arm, Cell, Definition, Outcome, Rates, at_edge, best_rate
from sdd.lab.findings import Findings, Interval, Measured, Picture, Table, listed, seeds_text
from sdd.lab.statistics import lr_sensitivity, paired_difference
from sdd.lab.studies.shared import HELD_OUT, cost_table, general_limits, not_converged_text

#: Two decades around the base rate, seven rates.
FACTORS = tuple(10 ** (step / 3) for step in range(-3, 4))
REFERENCE = "sdd"


def read(outcome: Outcome) -> Findings:
    """Sensitivity and best loss of each method over one grid of rates."""
    grids = {arm.name: outcome.grids[arm.name, DEFAULT.name] for arm in outcome.plan.arms}
    sensitivity = {name: sensitivities(grid) for name, grid in grids.items()}
    best = {name: best_losses(grid) for name, grid in grids.items()}
    return Findings(
        answer=_answer(sensitivity),
        conclusions=[*_beside_reference(sensitivity, best), *_breaking(grids)],
        limits=_limits(outcome, grids),
        published=None,
        tables=[
            _summary(outcome, grids, sensitivity, best),
            _loss_table(outcome, grids),
            cost_table([grid[best_rate(grid)] for grid in grids.values()], outcome),
        ],
        pictures=[_picture(outcome, grids)],
    )


def sensitivities(grid: Mapping[float, Cell]) -> dict[int, float]:
    """Learning-rate sensitivity by seed: the mean over the rates of min(final, initial loss) - best final loss."""
    seeds = [result.seed for result in next(iter(grid.values())).results]
    found: dict[int, float] = {}
    for seed in seeds:
        runs = [next(result for result in cell.results if result.seed == seed) for cell in grid.values()]
        # Of a run that stayed finite the loss counts, whether or not it counts as converged.
        found[seed] = lr_sensitivity([run.eval_loss for run in runs], runs[0].initial_loss)
    return found


def best_losses(grid: Mapping[float, Cell]) -> dict[int, float]:
    """Reported loss by seed, each at the rate that is best on the tuning segment for the other seeds.

    So no loss is reported on the text and the seed that its rate was chosen on; with one seed it is the seed's own
    rate.
    """
    cells = list(grid.items())
    seeds = [result.seed for result in cells[0][1].results]
    found: dict[int, float] = {}
    for seed in seeds:
        others = {rate: _without(cell, seed) if len(seeds) > 1 else cell for rate, cell in cells}
        found[seed] = grid[best_rate(others)].losses[seed]
    return found


def _without(cell: Cell, seed: int) -> Cell:
    return Cell(cell.arm, cell.condition, cell.rate, tuple(result for result in cell.results if result.seed != seed))


def _summary(
    outcome: Outcome,
    grids: Mapping[str, Mapping[float, Cell]],
    sensitivity: Mapping[str, Mapping[int, float]],
    best: Mapping[str, Mapping[int, float]],
) -> Table:
    rates = sorted(next(iter(grids.values())))
    reference = sensitivity.get(REFERENCE)
    columns = [
        "method",
        "LR sensitivity",
        f"minus that of {REFERENCE}",
        "best rate",
        "loss at the best rate",
        "highest rate",
    ]
    rows = []
    for name, grid in grids.items():
        trained = [rate for rate in rates if not grid[rate].failed]
        other = Interval(paired_difference(sensitivity[name], reference), signed=True) if reference else "-"
        rows.append(
            [
                name,
                Measured(sensitivity[name]),
                "" if name == REFERENCE else other,
                f"{best_rate(grid):g}",
                Measured(best[name]),
                f"{max(trained):g}" if trained else "-",
            ]
        )
    return Table(
        "sensitivity",
        f"Learning-rate sensitivity over {rates[0]:g} to {rates[-1]:g}, nats a token, "
        f"{seeds_text(outcome.plan.request.seeds)}",
        columns,
        rows,
        "Sensitivity: mean over the rates of min(final, initial loss) minus the best final loss (arXiv 2309.14322); "
        "lower is less sensitive. Loss at the best rate: each seed at the rate that was best for the others on the "
        "tuning segment. Highest rate: at which every seed converged. ± is half of Student's 95% interval, "
        "differences paired by seed.",
    )


def _loss_table(outcome: Outcome, grids: Mapping[str, Mapping[float, Cell]]) -> Table:
    rates = sorted(next(iter(grids.values())))
    rows = [[name, *(Measured(grid[rate].losses) for rate in rates)] for name, grid in grids.items()]
    return Table(
        "loss",
        "Held-out loss at the end by learning rate, nats a token",
        ["method", *(f"{rate:g}" for rate in rates)],
        rows,
        not_converged_text(),
    )


def _answer(sensitivity: Mapping[str, Mapping[int, float]]) -> str:
    ranked = sorted(sensitivity, key=lambda name: Measured(sensitivity[name]).estimate.value)
    numbers = ", ".join(f"{name} {Measured(sensitivity[name])}" for name in ranked)
    return f"From the least sensitive to the most: {numbers} (nats a token)."


def _beside_reference(
    sensitivity: Mapping[str, Mapping[int, float]], best: Mapping[str, Mapping[int, float]]
) -> list[str]:
    if REFERENCE not in sensitivity or len(sensitivity) == 1:
        return []
    texts: list[str] = []
    for what, numbers in (("sensitivity", sensitivity), ("loss at its best rate", best)):
        apart: dict[str, list[str]] = {"higher": [], "lower": [], "open": []}
        for name in numbers:
            if name != REFERENCE:
                change = paired_difference(numbers[name], numbers[REFERENCE])
                side = "open" if not change.excludes(0) else "higher" if change.value > 0 else "lower"
                apart[side].append(name)
        parts = [
            f"{side} than {REFERENCE}'s for {listed(names)}"
            for side, names in apart.items()
            if names and side != "open"
        ]
        if apart["open"]:
            parts.append(f"not told apart from {REFERENCE}'s for {listed(apart['open'])}")
        texts.append(f"The {what} is {', '.join(parts)} (95% intervals of paired differences).")
    return texts


def _breaking(grids: Mapping[str, Mapping[float, Cell]]) -> list[str]:
    texts: list[str] = []
    for name, grid in grids.items():
        failed = [rate for rate in sorted(grid) if 2 * grid[rate].failed > len(grid[rate].results)]
        if failed:
            texts.append(f"{name}: most seeds do not converge at {', '.join(f'{rate:g}' for rate in failed)}.")
    return texts


def _limits(outcome: Outcome, grids: Mapping[str, Mapping[float, Cell]]) -> list[str]:
    edges = [name for name, grid in grids.items() if at_edge(grid)]
    warning = [f"The best rate of {listed(edges)} still lies at an end of the extended grid."] if edges else []
    return [
        *warning,
        "The measure depends on the range: all methods share one, which the best rate of none may end.",
        "The measure is relative to a method's own best: one that learns little at any rate, or fails at most of them, "
        "comes out insensitive. It says something only beside the losses, and of a run so short that low rates learn "
        "nothing, mostly how far a method gets at all.",
        *general_limits(outcome),
    ]


def _picture(outcome: Outcome, grids: Mapping[str, Mapping[float, Cell]]) -> Picture:
    rates = sorted(next(iter(grids.values())))
    words = [
        f"{name}: " + ", ".join(f"{Measured(grid[rate].losses)} at {rate:g}" for rate in rates) + "."
        for name, grid in grids.items()
    ]

    def draw():
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, style_of

        curves: list[Curve] = []
        for arm in outcome.plan.arms:
            cells = [grids[arm.name][rate] for rate in rates]
            losses = [[_drawn(cell, seed) for cell in cells] for seed in outcome.plan.seeds]
            curves.append(Curve(arm.name, style_of(arm.name, arm.placement), [rates], losses))
        axes = (Axis("peak learning rate", log=True), HELD_OUT.axis())
        initial = [result.initial_loss for grid in grids.values() for cell in grid.values() for result in cell.results]
        start = sum(initial) / len(initial)
        return draw_curves([CurvePanel("", *axes, curves, levels={"before training": start})], columns=1)

    caption = (
        f"Held-out loss at the end against the peak learning rate, mean of {seeds_text(outcome.plan.request.seeds)}, "
        "the band their range; a run that diverged stands at the loss before training, as the measure counts it."
    )
    return Picture("lr", caption, f"Held-out loss in nats a token by learning rate. {' '.join(words)}", draw)


def _drawn(cell: Cell, seed: int) -> float:
    run = next(result for result in cell.results if result.seed == seed)
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
