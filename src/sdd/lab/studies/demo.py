"""The demo: four placements under a recommended and a hard setting, in minutes on two cores."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sdd.draw.panel import Panel, share_scale
from sdd.draw.style import PLACEMENT_STYLES
from sdd.errors import RunFailed
from sdd.evals.unigram import Reference, token_frequencies
from sdd.lab.demo_results import NOISE, Results, as_dict, collect, conclusions
from sdd.lab.grid.runner import Grid
from sdd.placement import placements
from sdd.report import curves, require_report_extra
from sdd.report.page import environment_rows, settings_tables
from sdd.report.runs import load_run
from sdd.train import RunConfig, preset
from sdd.train.config import resolve

if TYPE_CHECKING:
    from sdd.report.html import FigureGroup

QUESTION = "does a Post-Norm Transformer break under a hard setting, and what do other placements of the norms do?"
PLACEMENTS = ("sdd", "prenorm-qk", "postnorm", "deepnorm")
PRESET = "nano"
STEPS = 350
_SECONDS_A_RUN = 50  # on one core of 2020 or later


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        name: in tables and run names.
        lr: peak learning rate, common to all placements.
        warmup: steps.
    """

    name: str
    lr: float
    warmup: int


#: At the recommended rate every placement learns within STEPS (at 4e-3 Post-Norm does not). The hard setting joins two
#: perturbations of arXiv 2502.15499, table 2.
SETTINGS = (Setting("recommended", lr=1e-3, warmup=40), Setting("hard", lr=1e-2, warmup=0))


def grid(seeds: int) -> list[tuple[str, RunConfig]]:
    """The runs: placement x setting x seed, of one shape, on the same data in the same order."""
    return [
        (run_name(placement, setting, seed), run_config(placement, setting, seed))
        for seed in range(seeds)
        for setting in SETTINGS
        for placement in PLACEMENTS
    ]


def run_name(placement: str, setting: Setting, seed: int) -> str:
    """The name of a run's directory."""
    return f"{setting.name}-{placement}-seed{seed}"


def run_config(placement: str, setting: Setting, seed: int) -> RunConfig:
    """One run: the preset as it stands, but for placement, setting, seed and length."""
    base = preset(PRESET)
    return replace(
        base,
        model=replace(base.model, placement=placements[placement]),
        optim=replace(base.optim, lr=setting.lr, warmup=setting.warmup),
        guard=replace(base.guard, nonfinite="stop", spikes="observe"),  # a study observes
        steps=STEPS,
        seed=seed,
        eval_every=STEPS // 10,
        checkpoint_every=0,
        keep_checkpoints=1,
    )


def run(out: Path, seeds: int, workers: int | None) -> int:
    """Run what is not finished, then write results.json, figures and report.html; prints the table."""
    require_report_extra()  # before minutes of work, not after
    configs = grid(seeds)
    runs = Grid(configs, out, workers)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if runs.waiting:
        _announce(console, runs)
    reference = _reference(out, configs[0][1])
    runs.run()
    crashed = [job for job in runs.jobs if job.state == "crashed"]
    if crashed:
        raise RunFailed(f"{crashed[0].name}: {crashed[0].detail}; see {out / 'logs'}; the same command tries again")
    results = _results(runs, reference, seeds)
    _write(out, results)
    Console(highlight=False).print(table(results))
    for sentence in conclusions(results):
        console.print(sentence, markup=False)
    console.print(f"\nThe page: {out / 'report.html'}", markup=False)
    return 0


def table(results: Results) -> Table:
    """Placement x setting: held-out bits per byte, loss, and what the hard setting did."""
    found = Table(box=None, pad_edge=False)
    found.add_column("placement")
    for setting in SETTINGS:
        found.add_column(f"{setting.name}:\nbits/byte", justify="right")
        found.add_column("\nloss", justify="right")
    found.add_column("\nchange", justify="right")
    found.add_column("under the\nhard setting")
    for row in results.rows:
        cells = (row.recommended, row.hard)
        numbers = [f"{value:.3f}" for cell in cells for value in (cell.bits_per_byte, cell.eval_loss)]
        found.add_row(row.placement, *numbers, f"{row.change:+.3f}", row.verdict)
    return found


def panels(results: Results) -> dict[str, list[Panel]]:
    """The figures by name, each a pair of panels of one scale: the recommended setting and the hard one."""
    found: dict[str, list[Panel]] = {}
    for name, what, build in (
        ("heldout", "held-out text", curves.heldout_panel),
        ("loss", "training loss", curves.loss_panel),
        ("grad-norm", "gradient norm", curves.grad_norm_panel),
    ):
        pair: list[Panel] = []
        for setting in SETTINGS:
            cells = [row.hard if setting.name == "hard" else row.recommended for row in results.rows]
            runs = [replace(run, name=cell.placement) for cell in cells for run in cell.runs]
            styles = [PLACEMENT_STYLES[run.name] for run in runs]
            panel = build(runs, styles, f"{setting.name.capitalize()}: {what}")
            if panel and name == "heldout":
                panel = replace(panel, reference=(results.reference.bits_per_byte or math.nan, "token frequencies"))
            pair += [panel] if panel else []
        found[name] = share_scale(pair)
    return found


def _announce(console: Console, runs: Grid) -> None:
    waiting = len(runs.waiting)
    still = "" if waiting == len(runs.jobs) else f", {waiting} still to do"
    minutes = math.ceil(math.ceil(waiting / runs.workers) * _SECONDS_A_RUN / 60)
    config = runs.jobs[0].config
    console.print(
        f"{len(runs.jobs)} runs of {config.steps} steps, {config.steps * config.tokens_per_step:,} tokens each: "
        f"{', '.join(PLACEMENTS)} under a recommended and a hard setting{still}.\n"
        f"{runs.workers} at once, {runs.threads} CPU thread{'s' if runs.threads > 1 else ''} each: "
        f"about {minutes} minutes. Ctrl-C saves; the same command goes on.",
        markup=False,
    )


def _reference(out: Path, config: RunConfig) -> Reference:
    """What token frequencies reach on the held-out text of the runs, kept beside them."""
    file = out / "reference.json"
    if file.exists():
        return Reference(**json.loads(file.read_text(encoding="utf-8")))
    out.mkdir(parents=True, exist_ok=True)
    # Also tokenises the corpus, once, before several runs would do it at the same time.
    data = resolve(config)
    reference = token_frequencies(data, config.eval_sequences, config.model.context)
    file.write_text(json.dumps(asdict(reference), indent=2) + "\n", encoding="utf-8")
    return reference


def _results(runs: Grid, reference: Reference, seeds: int) -> Results:
    found = {
        (placement, setting.name): [load_run(runs.path(run_name(placement, setting, seed))) for seed in range(seeds)]
        for placement in PLACEMENTS
        for setting in SETTINGS
    }
    return collect(found, reference)


def _write(out: Path, results: Results) -> None:
    from sdd.draw import curves as figures
    from sdd.report import html as page

    text = json.dumps(as_dict(results), indent=2) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")
    drawn = panels(results)
    note = curves.seeds_note(results.runs)
    for name, pair in drawn.items():
        figures.save_figure(figures.draw(pair, title=f"{PRESET}, {note.lower()}"), out / "figures" / name)
    groups = {name: page.figure_group(name, pair, results.runs) for name, pair in drawn.items()}
    page.write_page(out / "report.html", _page(results, groups))


def _page(results: Results, groups: "dict[str, FigureGroup]") -> str:
    from sdd.report import html as page

    config = run_config(PLACEMENTS[0], SETTINGS[0], 0)
    return page.render(
        "demo.html",
        title="Does Post-Norm break? Four placements of the norms, two settings",
        results=results,
        conclusions=conclusions(results),
        config=config,
        settings=SETTINGS,
        placements=[placements[name] for name in PLACEMENTS],
        swatches={name: page.swatch(PLACEMENT_STYLES[name]) for name in PLACEMENTS},
        figures=groups,
        noise=NOISE,
        common=settings_tables(results.runs)["common"],
        environments=environment_rows(results.runs),
    )
