"""Plans of layouts as text."""

from collections.abc import Sequence

from sdd.plan.cluster import STEP_BETWEEN, STEP_INSIDE, Exchange
from sdd.plan.estimate import USABLE
from sdd.plan.layouts import LayoutPlan, Search
from sdd.terminal import aligned, counted, indented

_GIB, _GB = 2**30, 1e9


def show_search(name: str, search: Search) -> str:
    """Show all layouts of a search, the fastest first, and what was left out.

    Args:
        name: of the preset.
        search: its result, with a layout at least.
    """
    plans = [*search.fitting, *search.too_large]
    head = ("layout", "micro-batch", "peak GiB", "inside GB", "between GB", "compute s", "prefetched s", "waiting s")
    rows = [(*head, "step s", "MFU"), *map(_row, plans)]
    lines = aligned(rows, right=range(1, len(rows[0])))
    if search.too_large:
        lines.append("! does not fit, with one sequence at a time")
    left_out = [f"{counted(len(found), 'layout')}: {why}" for why, found in search.left_out.items()]
    sections = [
        [_title(name, plans[0])],
        [f"{counted(len(plans), 'layout')}, a step each", *indented(lines)],
        *([["Left out, not traced", *indented(left_out)]] if left_out else []),
        _assumptions(plans[0]),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def show_layout(name: str, plan: LayoutPlan) -> str:
    """Show one layout: memory, every exchange, the time of a step.

    Args:
        name: of the preset.
        plan: the plan.
    """
    sections = [
        [f"{_title(name, plan)}: {plan.layout}"],
        ["Batch", *indented(_batch(plan))],
        ["Memory of a GPU, GiB", *indented(_memory(plan))],
        ["A GPU sends in a step, GB", *indented(_exchanges(plan.exchanges))],
        ["Seconds of a step", *indented(_time(plan))],
        _assumptions(plan),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _title(name: str, plan: LayoutPlan) -> str:
    placement = plan.case.model.placement.name or "own placement"
    nodes = -(-plan.case.gpus // plan.cluster.gpus_per_node)
    of = f" in {counted(nodes, 'node')}" if nodes > 1 else ""
    return f"{name} with {placement} on {plan.case.gpus} x {plan.gpu.name}{of}"


def _row(plan: LayoutPlan) -> tuple[str, ...]:
    found = plan.exchanges
    inside, between = (sum(getattr(exchange, link) for exchange in found) / _GB for link in ("inside", "between"))
    seconds = (plan.compute, plan.prefetched, plan.waiting, plan.step)
    return (
        str(plan.layout),
        str(plan.case.micro_batch),
        f"{plan.peak / _GIB:,.2f}" + ("" if plan.fits else " !"),
        f"{inside:,.2f}",
        f"{between:,.2f}",
        *(f"{value:.3g}" for value in seconds),
        f"{plan.whole_mfu:.3f}",
    )


def _batch(plan: LayoutPlan) -> list[str]:
    batch = plan.case.run.data.batch_size
    rows = [
        ("a step", f"{batch:,} sequences of {plan.case.model.context:,} tokens"),
        ("a data rank", f"{plan.passes:,} x {plan.case.micro_batch:,} sequences, of {batch // plan.layout.data:,}"),
    ]
    return aligned(rows)


def _memory(plan: LayoutPlan) -> list[str]:
    memory = plan.trace.memory
    rows = [
        ("weights", memory.weights),
        ("moments of the optimiser", memory.moments),
        ("gradients", memory.gradients),
        ("copies of weights", memory.copies),
        ("activations", memory.activations),
        ("loss or block, the larger", max(memory.loss, memory.block)),
        ("peak", memory.peak),
        ("usable", plan.capacity),
    ]
    verdict = f"{USABLE:.0%} of {plan.gpu.memory:g} GiB: " + ("it fits" if plan.fits else "it does NOT fit")
    lines = [(name, f"{value / _GIB:,.2f}", verdict if name == "usable" else "") for name, value in rows]
    return aligned(lines, right=(1,))


def _exchanges(found: Sequence[Exchange]) -> list[str]:
    if not found:
        return ["nothing"]
    head = ("operation", "over", "GPUs", "calls", "inside", "between", "seconds", "")
    rows = [
        (
            exchange.kind,
            exchange.dims,
            str(exchange.processes),
            f"{exchange.calls:,}",
            f"{exchange.inside / _GB:,.3f}",
            f"{exchange.between / _GB:,.3f}",
            f"{exchange.seconds:.2g}",
            "beside compute" if exchange.prefetched else "compute waits",
        )
        for exchange in found
    ]
    return aligned([head, *rows], right=range(2, 7))


def _time(plan: LayoutPlan) -> list[str]:
    speed = plan.case.run.tokens_per_step / plan.step
    rows = [
        ("compute", f"{plan.compute:.3g}", f"the model's FLOPs at {plan.mfu:.3g} of the peak, an assumed MFU"),
        ("prefetched", f"{plan.prefetched:.3g}", "exchanges of FSDP2, beside compute"),
        ("waiting", f"{plan.waiting:.3g}", "all other exchanges"),
        ("step", f"{plan.step:.3g}", "the larger of the first two, and waiting"),
        ("tokens a second", f"{speed:,.0f}", f"an MFU of {plan.whole_mfu:.3f} with the exchanges"),
    ]
    return aligned(rows, right=(1,))


def _assumptions(plan: LayoutPlan) -> list[str]:
    cluster = plan.cluster
    lines = [
        "An estimate from stated numbers, not a measurement",
        f"  links of a GPU in one direction: {cluster.link:g} GB/s inside a node of {cluster.gpus_per_node}, "
        f"{cluster.network:g} GB/s between nodes",
        f"  rings: {STEP_INSIDE * 1e6:g} us a step inside, {STEP_BETWEEN * 1e6:g} us between; "
        "whole overlap of FSDP2's exchanges with compute, none of the others",
        "  not counted: the optimiser's arithmetic, data loading, evaluations, checkpoints, contention of links",
    ]
    if plan.case.model.moe is not None:
        lines.append("  tokens are taken to be spread evenly over the experts")
    return lines
