"""Tables read from the code, the placements' sites and rules, the presets, the fields of a run; and from results."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from which import which_table

from sdd.models import as_printed, count_parameters, model_presets
from sdd.models.presets import PRINTED_SHAPES
from sdd.placement import SITES, Norm, Placement, Site, placements
from sdd.train import config_io, preset


def cell(placement: Placement, site: Site) -> str:
    """How a placement norms a site: `full` or `head`, `head*` for one alpha shared by the heads."""
    norm = placement.norms.get(site)
    if norm is None:
        return ""
    if placement.joint_gate_up and site in ("gate", "up"):
        return "joint"
    words = [norm.group + ("\\*" if norm.shared_alpha else "")]
    words += [] if norm.scale else ["bare"]
    words += [] if norm.depth_factor == "one" else [norm.depth_factor.removeprefix("1")]
    return " ".join(words)


def alphas(placement: Placement) -> str:
    """The initial alphas other than one, `1/sqrt(2L)` at `attn_out`, `ffn_out`; none where no norm has one."""
    if not any(norm.scale for norm in placement.norms.values()):
        return "none"
    sites: dict[str, list[str]] = {}
    for site in SITES:
        norm = placement.norms.get(site)
        if norm is not None and (norm.alpha_init, norm.alpha_factor) != ("one", 1.0):
            sites.setdefault(alpha_text(norm), []).append(f"`{site}`")
    return "; ".join(f"{alpha} at {', '.join(names)}" for alpha, names in sites.items()) or "one"


def alpha_text(norm: Norm) -> str:
    """The named initial value of alpha, with its factor where it has one."""
    return f"{norm.alpha_init}" if norm.alpha_factor == 1 else f"{norm.alpha_factor:g} * {norm.alpha_init}"


def eps_text(placement: Placement) -> str:
    """The eps of all sites, or each that occurs."""
    return ", ".join(f"{eps:g}" for eps in sorted({norm.eps for norm in placement.norms.values()}))


def overrides_text(placement: Placement) -> str:
    """The norms in which single blocks differ, if any do."""
    changes = [
        f"; block {layer}: " + ", ".join(f"{'no ' if norm is None else ''}`{site}`" for site, norm in sites.items())
        for layer, sites in placement.overrides.items()
    ]
    return "".join(changes)


def scales_text(placement: Placement) -> str:
    """The learned scales without a norm, and the rule for weights, if there are any."""
    scales = ", ".join(f"`{site}`" for site in placement.scales)
    rule = "; rows and columns of matrices are unit vectors" if placement.weights == "unit" else ""
    return (f"; learned scales: {scales}" if scales else "") + rule


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def site_table() -> str:
    """One row a site, one column a placement."""
    rows = [[f"`{site}`", *(cell(placement, site) for placement in placements.values())] for site in SITES]
    return table(["site", *(f"`{name}`" for name in placements)], rows)


def rule_table() -> str:
    """One row a placement: alphas, residual rule, init rule, eps, source and what single blocks change."""
    rows = [
        [
            f"`{name}`",
            alphas(placement),
            placement.residual,
            f"`{placement.init_words}`",
            eps_text(placement),
            placement.source + overrides_text(placement) + scales_text(placement),
        ]
        for name, placement in placements.items()
    ]
    return table(["placement", "initial alpha", "residual rule", "init", "eps", "source"], rows)


def preset_table() -> str:
    """One row a preset: shape, batch, parameters."""
    rows = []
    for name, model in model_presets.items():
        count, run = count_parameters(model), preset(name)
        active = "" if model.moe is None else f" ({count.published_active / 1e6:,.1f}M)"
        experts = "" if model.moe is None else f" x {model.moe.n_experts}, {model.moe.top_k} used"
        rows.append(
            [
                f"`{name}`",
                *(str(value) for value in (model.n_layers, model.d_model, f"{model.d_ff}{experts}")),
                f"{model.n_heads} / {model.n_kv_heads}",
                f"{model.vocab_size:,}{', tied' if model.tie_embeddings else ''}",
                f"{run.data.batch_size} x {model.context}",
                f"{count.published / 1e6:,.1f}M" + active,
                f"{count_parameters(as_printed(name)).published / 1e6:,.1f}M" if name in PRINTED_SHAPES else "",
            ]
        )
    header = ["preset", "n_layers", "d_model", "d_ff", "heads / kv", "vocabulary", "batch x context", "parameters"]
    return table([*header, "as printed"], rows)


def field_table() -> str:
    """One row a field of a run, placement excepted: type, what three presets set, what it is."""
    names = ("nano", "micro", "1b")
    runs = [config_io.to_dict(preset(name)) for name in names]
    rows = [
        [
            f"`{dotted}`",
            config_io.describe_type(hint),
            *("" if dotted == "model.placement" else value_text(run, dotted) for run in runs),
            about,
        ]
        for dotted, hint, about in config_io.fields()
    ]
    return table(["field", "type", *(f"`{name}`" for name in names), "meaning"], rows)


def value_text(run: Any, dotted: str) -> str:
    """A field's value as JSON would have it, numbers short; "none" in an optional part that is not set up."""
    for key in dotted.split("."):
        run = None if run is None else run[key]
    if run is None or isinstance(run, bool):
        return str(run).lower()
    return f"{run:g}" if isinstance(run, float) else str(run)


TABLES = {
    "sites": site_table,
    "rules": rule_table,
    "presets": preset_table,
    "fields": field_table,
    "which": which_table,
}


class Table(SphinxDirective):
    """Insert the table named by the argument, one of `TABLES`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The parsed table."""
        if self.arguments[0] not in TABLES:
            raise self.error(f"no table {self.arguments[0]!r}, choose one of {list(TABLES)}")
        return self.parse_text_to_nodes(TABLES[self.arguments[0]]())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("code-table", Table)
    return {"parallel_read_safe": True}
