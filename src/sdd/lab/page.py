"""The page of a study, self-contained and as Markdown, with its tables and figures.

OUT/report.html   question, method, published numbers, ours, conclusion; opens from a file
OUT/README.md     the same for readers of the repository
OUT/tables/       each table as Markdown, CSV and JSON
OUT/figures/      each figure as PNG and SVG
"""

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdd.lab.definition import Outcome, PlannedStudy, short_length
from sdd.lab.findings import Findings, Table, write_tables
from sdd.lab.results import RunResult
from sdd.train import config_io

#: Parts of the environment that the page leaves out.
_LEFT_OUT = ("cpus", "processes", "machine")


def write_study(outcome: Outcome, findings: Findings) -> Path:
    """Write tables, figures and pages; returns report.html."""
    from sdd.draw import curves as figures
    from sdd.report import html as page

    plan = outcome.plan
    out = plan.request.out
    write_tables(findings.all_tables, out / "tables")
    svgs: dict[str, Any] = {}
    for picture in findings.pictures:
        figure = picture.draw()
        figures.save_figure(figure, out / "figures" / picture.name)
        svgs[picture.name] = page.Markup(figures.inline_svg(figure, picture.name, picture.description))
    text = page.render(
        "study.html",
        title=plan.definition.title,
        plan=plan,
        findings=findings,
        svgs=svgs,
        command=command(plan),
        placements=list({plan.placement(arm).name: plan.placement(arm) for arm in plan.arms}.values()),
        settings=_settings(plan),
        environments=environments(outcome.results),
        runs=len(outcome.results),
    )
    page.write_page(out / "report.html", text)
    page.write_page(out / "README.md", markdown(outcome, findings))
    return out / "report.html"


def command(plan: PlannedStudy) -> str:
    """The one command that regenerates the page."""
    request = plan.request
    words = ["sdd", "study", plan.definition.name, "--preset", request.preset, "--seeds", str(request.seeds)]
    if request.placements:
        words += ["--placements", ",".join(request.placements)]
    if request.conditions:
        words += ["--conditions", ",".join(request.conditions)]
    if plan.lengths:
        words += ["--lengths", ",".join(map(short_length, plan.lengths))]
    if plan.depths:
        words += ["--depths", ",".join(map(str, plan.depths))]
    if request.tuned:
        words.append("--tuned")
    for name, value in request.overrides.items():
        words += [f"--{name}", "none" if value is None else str(value)]
    return shlex.join([*words, "--out", request.out.as_posix()])


def markdown(outcome: Outcome, findings: Findings) -> str:
    """The page as Markdown."""
    plan = outcome.plan
    parts = [
        f"# {plan.definition.title}",
        f"**Question:** {plan.definition.question}",
        f"**Answer:** {findings.answer}",
        "\n".join(f"- {sentence}" for sentence in findings.conclusions),
        "## Method",
        " ".join(plan.method),
    ]
    if findings.published:
        parts += ["## Published and ours", *_table_parts(findings.published)]
    parts.append("## Ours")
    for table in findings.tables:
        parts += [f"### {table.title}", *_table_parts(table)[1:]]
    for picture in findings.pictures:
        parts += [f"![{picture.description}](figures/{picture.name}.png)", f"*{picture.caption}*"]
    parts += [
        "## What cannot be concluded",
        "\n".join(f"- {sentence}" for sentence in findings.limits),
        "## How to make this page again",
        f"```\n{command(plan)}\n```",
        f"It draws the page from the {len(outcome.results)} result files in `results/`, and runs what is missing "
        "there: more seeds with a larger `--seeds`.",
        _environment_text(outcome.results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def environments(results: list[RunResult]) -> Mapping[str, list[tuple[str, str]]]:
    """Versions and machines as pairs (number of runs, value), for the template; no number where all runs agree."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for name in dict.fromkeys(key for result in results for key in result.environment if key not in _LEFT_OUT):
        values = Counter(str(result.environment.get(name, "-")) for result in results)
        rows[name] = [("" if len(values) == 1 else f"{count} runs", text) for text, count in values.items()]
    return rows


def _table_parts(table: Table) -> list[str]:
    return [table.title, table.markdown().strip(), table.note]


def _settings(plan: PlannedStudy) -> dict[str, Any]:
    """The fields common to all runs, without those that arms, conditions and seeds change."""
    changed = {"model.placement", "optim.lr", "seed", "threads"}
    changed |= {name for condition in plan.conditions for name in condition.changes}
    changed |= {name for arm in plan.arms for name in arm.changes}
    changed |= {"model.init_scale"} if plan.rates.kind == "searched" else set[str]()
    fields = config_io.flatten(config_io.to_dict(plan.base))
    return {name: value for name, value in fields.items() if name not in changed}


def _environment_text(results: list[RunResult]) -> str:
    rows = environments(results)
    parts = [f"{name} {', '.join(value for _, value in values)}" for name, values in rows.items()]
    return f"Made with {'; '.join(parts)}." if parts else ""
