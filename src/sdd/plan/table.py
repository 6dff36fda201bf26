"""A plan as text: aligned numbers, each with its unit and meaning."""

from sdd.plan.estimate import USABLE, Plan
from sdd.plan.memory import Memory
from sdd.terminal import aligned, indented


def show_plan(name: str, plan: Plan) -> str:
    """Show every number of a plan with its unit and convention.

    Args:
        name: of the preset.
        plan: the plan.
    """
    case = plan.case
    model = case.model
    unit = "GiB" if plan.memory.peak >= 2**30 else "MiB"
    size = 2**30 if unit == "GiB" else 2**20
    sections = [
        [f"{name} with {model.placement.name or 'own placement'} on {case.gpus} x {plan.gpu.name}, {plan.precision}"],
        ["Parameters", *indented(_parameters(plan))],
        [f"FLOPs of training a token, at a context of {model.context:,}", *indented(_flops(plan))],
        ["Batch", *indented(_batch(plan))],
        [f"Memory of a GPU, {unit}", *indented(_memory(plan, size))],
        [f"Peak with micro-batches of {case.micro_batch}, {unit}", *indented(_alternatives(plan, size))],
        [f"Time at {plan.mfu:.3g} of the peak, an assumed MFU", *indented(_time(plan))],
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _parameters(plan: Plan) -> list[str]:
    count = plan.parameters
    rows = [
        ("all", f"{count.total:,}", f"{count.scales:,} of them alphas and norm weights"),
        ("active a token", f"{count.active:,}", _active(plan)),
        ("as published labels count", f"{count.published:,}", "without alphas and norm weights"),
    ]
    return aligned(rows, right=(1,))


def _active(plan: Plan) -> str:
    moe = plan.case.model.moe
    of = "all of a dense model" if moe is None else f"{moe.top_k} of {moe.n_experts} experts a block"
    return f"{of}, the whole embedding included"


def _flops(plan: Plan) -> list[str]:
    flops = plan.flops
    halved = f"what MFU counts; {_scaled(flops.causal)} if causal attention is halved"
    rows = [
        (
            "matrix products",
            _scaled(flops.matmul),
            f"6 * {flops.matmul_parameters:,} active parameters: blocks and head",
        ),
        ("attention", _scaled(flops.attention), "12 * blocks * d_model * context: the causal half not subtracted"),
        ("model", _scaled(flops.model), halved),
        ("recomputed", _scaled(flops.recomputed), _recomputed(plan)),
        ("hardware", _scaled(flops.hardware), "model and recomputed; norms not counted"),
    ]
    return aligned(rows, right=(1,))


def _recomputed(plan: Plan) -> str:
    parts = ["forward pass of the blocks"] if plan.case.run.activation_checkpointing else []
    parts += ["q k^T in the backward pass of fused attention"] if plan.case.has_fused_attention else []
    return ", ".join(parts) or "nothing"


def _batch(plan: Plan) -> list[str]:
    batch, case = plan.case.run.data.batch_size, plan.case
    rows = [
        ("a step", f"{batch:,} sequences of {case.model.context:,} tokens = {plan.case.run.tokens_per_step:,} tokens"),
        ("a GPU", f"{batch // case.gpus // case.micro_batch:,} micro-batches of {case.micro_batch:,} sequences"),
        ("to set", f"--accumulate {plan.accumulate}, the micro-batches of a step over all GPUs"),
    ]
    return aligned(rows)


def _memory(plan: Plan, size: int) -> list[str]:
    memory, case = plan.memory, plan.case
    copies = "embedding, head and two blocks, gathered" if case.gpus > 1 else "as matrix products read them"
    rows = [
        ("weights", memory.weights, "float32" + (", sharded" if case.gpus > 1 else "")),
        (f"{plan.optimizer.name} moments", memory.moments, _moments(plan)),
        ("gradients", memory.gradients, "the same"),
        ("copies of weights", memory.copies, copies),
        ("activations", memory.activations, f"of {case.tokens:,} tokens: " + _kept(plan)),
        ("  of them norms", plan.norms, "kept only because of norms"),
        ("loss", memory.loss, ("in chunks" if case.chunked_loss else "all logits") + _absent(memory, memory.loss)),
        ("block", memory.block, "forward and backward pass of one block" + _absent(memory, memory.block)),
        ("peak", memory.peak, ""),
        ("usable", plan.capacity, f"{USABLE:.0%} of {plan.gpu.memory:g} GiB: " + _verdict(plan)),
    ]
    lines = aligned([(name, f"{part / size:,.2f}", about) for name, part, about in rows], right=(1,))
    if not case.has_fused_attention:
        lines.append("torch has no fused attention for this on a GPU: the context x context weights are counted")
    if not case.has_kernels:
        lines.append("Triton is not installed here: counted without fused kernels, which keep less")
    return lines


def _moments(plan: Plan) -> str:
    return "the same, once for the matrices of the blocks, else twice" if plan.optimizer.flops else "the same, twice"


def _optimizer_alone(plan: Plan) -> str:
    bound = "by memory bandwidth" + (" and the FLOPs of orthogonalising" if plan.optimizer.flops else "")
    return f"{plan.optimizer.name} alone at least {plan.optimizer_seconds:.2g}, {bound}"


def _kept(plan: Plan) -> str:
    return "each block's input" if plan.case.run.activation_checkpointing else "all that the derivatives need"


def _absent(memory: Memory, part: int) -> str:
    return "" if part == max(memory.loss, memory.block) else " (not at the peak)"


def _verdict(plan: Plan) -> str:
    return "it fits" if plan.fits else "it does NOT fit"


def _alternatives(plan: Plan, size: int) -> list[str]:
    """The table of four peaks; `!` marks those that do not fit."""
    runs = [(case.run, memory.peak) for case, memory in plan.alternatives()]
    found = {(run.activation_checkpointing, run.chunked_loss): peak for run, peak in runs}

    def cell(checkpoint: bool, chunked: bool) -> str:
        peak = found.get((checkpoint, chunked))
        return "-" if peak is None else f"{peak / size:,.2f}" + ("  " if peak <= plan.capacity else " !")

    names = {False: "all activations", True: "--activation-checkpointing true"}
    rows = [(name, cell(checkpoint, False), cell(checkpoint, True)) for checkpoint, name in names.items()]
    note = [] if max(found.values()) <= plan.capacity else ["! does not fit"]
    return [*aligned([("", "all logits  ", "--chunked-loss true  "), *rows], right=(1, 2)), *note]


def _time(plan: Plan) -> list[str]:
    step = plan.case.run.tokens_per_step / plan.tokens_per_second
    peak = plan.gpu.peak(plan.precision) / 1e12
    speed = plan.tokens_per_second
    rows = [
        ("peak", _number(peak), f"TFLOP/s a GPU, {plan.precision} without sparsity ({plan.gpu.source})"),
        ("hardware utilisation", f"{plan.hardware_utilisation:.3g}", "recomputed FLOPs counted"),
        ("tokens a second", _number(speed), f"{_number(speed / plan.case.gpus)} a GPU"),
        ("seconds a step", _number(step), _optimizer_alone(plan)),
        ("tokens", f"{plan.tokens:,}", f"{plan.steps:,} steps"),
        ("days", _number(plan.seconds / 86400), "without evaluations and checkpoints"),
        ("GPU-hours", _number(plan.gpu_hours), ""),
    ]
    return aligned(rows, right=(1,))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _scaled(flops: float) -> str:
    """The number with three decimals and a unit: `7.966 G`."""
    factor, unit = next((pair for pair in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if flops >= pair[0]), (1, ""))
    return f"{flops / factor:,.3f} {unit}" if unit else f"{flops:,.0f}  "
