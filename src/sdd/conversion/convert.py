"""`sdd.convert`: turn the layers of a model that was written without SDD into SDD layers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from sdd.conversion import advice
from sdd.conversion.become import converted_in
from sdd.conversion.fresh import convert_new
from sdd.conversion.groups import GroupChoice, check_choice
from sdd.conversion.guards import refuse_compiled, refuse_no_model, refuse_trained, refuse_wrapped
from sdd.conversion.known import known_readers
from sdd.conversion.match import Selection, as_patterns, check_patterns, matches, select
from sdd.conversion.numbers import is_finite, is_size
from sdd.conversion.outputs import depth_of
from sdd.conversion.plan import Plan
from sdd.conversion.pretrained import mark
from sdd.conversion.report import ConversionReport, KeptLayer
from sdd.conversion.trained import check_mode, convert_trained, observe_trained
from sdd.conversion.watch import watch
from sdd.nn import SDDLinear
from sdd.placement import SCALES
from sdd.terminal import counted

#: A number, a named function of L, or either by pattern.
AlphaInit = float | str | Mapping[str, float | str]


@torch.inference_mode(False)  # within it, alpha would be a tensor that cannot be trained
def convert(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mode: Literal["reinit", "calibrate", "observe"] = "reinit",
    *,
    output: str | Sequence[str] | None = None,
    group: GroupChoice = None,
    alpha_init: AlphaInit = "one",
    output_alpha_init: float | str = "1/sqrt(L)",
    n_layers: int | None = None,
    eps: float = 1e-6,
    generator: torch.Generator | None = None,
    example: Any = None,
    redraw: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    batches: Iterable[Any] | None = None,
    max_error: float | None = None,
) -> ConversionReport:
    r"""Turn the fully-connected layers of a model into SDD layers, in place, redrawn for training from scratch.

    Each converted layer computes `alpha * norm(V x) + b` where it computed `W x + b`. With in_features N,

        V ~ N(0, 1/(2 sqrt(2.5 N))) truncated at 3 std,    b = 0,    alpha = alpha_init, or output_alpha_init

    as arXiv 2502.15499 does, but for the 2: our own default `sdd` draws at half too. Embeddings, norms and the
    layers that stay keep their values: give a new model, and convert it before building the optimiser, compiling, or
    sharding. `print(sdd.convert(model))` shows what was done.

    Converted are `nn.Linear`, its subclasses that compute `x W^T + b` (tried on a random input), transformers' Conv1D,
    and the stacked matrices of experts that go through transformers' experts interface. A layer stays, with the reason
    in the report, if

    - it is the head: the model's `get_output_embeddings()`, a layer named like one (lm_head, classifier, fc, ...)
      outside the blocks, or one there that has the size of the labels or the vocabulary, or that no layer reads;
    - it is a router of experts: named so, or a `gate` beside experts, or with as many outputs as there are experts;
    - it is an adapter or what one wraps; it is frozen; its weight is zero; its bias was set on purpose (a forget gate),
      or it sets the time step of a state. These, heads and routers are guesses. To overrule them, name the layer in
      `include` by its full name, without wildcards;
    - another module owns its weight or bias too (tied to the embedding);
    - it computes something else than `W x + b` from its parameters: a subclass that does (quantised, LoRA), the
      out-projection of `nn.MultiheadAttention`, a parametrised layer, a weight that is no plain floating parameter, or
      a forward that was replaced;
    - it has one output feature, of which a norm would keep only the sign, or one input feature, whose magnitude a norm
      would erase;
    - its model is known to read the weight without calling the layer, whatever an example shows.

    With an example, the model is run to prove that it calls each converted layer and reads its weight nowhere else;
    see `sdd.conversion.prove`. A layer that is refuted is put back bit for bit, with the reason in the report. One that
    the example does not reach stays converted, is named, and is decided at its first call. The proof leaves nothing
    behind; while it runs it needs the memory of two more copies of the model. Without an example, a warning at the end
    of the first forward pass names the layers that it did not call.

    Every converted layer remains the same object. Its parameters, hooks, training flag, device, dtype and second names
    stay. Only its class changes (`SDDLinear` is not an `nn.Linear`), and alpha is added: float32 in a half-precision
    model, requires_grad as the weight's. Experts get one alpha for each stacked matrix, `down_proj_alpha`. Code that
    reads `.weight` without calling the layer would compute `V x` without the norm. Torch has one such case, the fused
    inference path of `nn.TransformerEncoder`; it is switched off where it would read a converted layer. On the meta
    device nothing is drawn: `to_empty` and `reset_parameters` of each module give the draw above.

    Args:
        model: any module.
        include: glob patterns (`fnmatch`, `*` crosses dots) of the layers to convert; None for all. A pattern fits a
            full dotted name or its ending after a dot: "q_proj", "mlp.*", "*.layers.0.*".
        exclude: patterns of the layers to leave; it wins over `include`.
        mode: "reinit" draws new values, as above. "calibrate" is for a trained model: it keeps W as V and b, bit for
            bit, and fits alpha to the outputs on a few `batches`, see `sdd.conversion.calibrate`; a layer that they
            do not reach stays. Stacked experts are fitted one by one. "observe" changes nothing: the report says how
            the scale of each layer's output, or each expert's, behaves on `batches`, and what calibration would cost.
        output: patterns of the projections that write to the residual stream; None for the last one to the width of
            the stream in each branch of a block, and outside blocks for the names in use (o_proj, down_proj, ...).
        group: norm groups of the features of a layer. None keeps the parts of fused projections apart where they are
            known (q|k|v, gate|up); "heads" also norms queries and keys head by head; a dict does so by pattern, its
            values being "heads" or what `SDDLinear` takes: `{"qkv_proj": [(2048, 64), (512, 64), (512, 0)]}`.
        alpha_init: initial alpha of the other layers: a number, or a named function of L (`sdd.placement.SCALES`), or
            a dict of them by pattern, which also holds for outputs that a pattern fits; 1 for the rest.
        output_alpha_init: initial alpha of the output projections, likewise.
        n_layers: L; None for the length of the longest list of blocks, those of all its stages and types.
        eps: added to the mean square of `V x`, inside the root.
        generator: for a reproducible draw; layers are drawn in the model's order, on the generator's device.
        example: one batch to prove the conversion on: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments.
        redraw: convert a model that shows signs of training: a config that was loaded, a gradient, or an optimiser
            with state. What its converted layers have learned is lost.
        optimizer: the model's optimiser, if there is one, to be asked whether it has taken steps.
        batches: for "calibrate" and "observe", examples of what the model was trained on: tensors, tuples of
            arguments, or mappings of keyword arguments. All are in memory at once, as one batch without gradients.
        max_error: for "calibrate", the largest median error a token with which a layer is converted.

    Returns:
        The report: converted and kept layers, L, what was proven, and notes.

    Raises:
        ValueError: if mode or a named scale is unknown, n_layers is below 1, a pattern fits no layer, a group does not
            fit, nothing is left to convert, or arguments do not fit the mode; the model is then unchanged.
        UserError: if it is no module, shows signs of training and redraw is not given, is in torch.compile or
            DistributedDataParallel or sharded, refuses the example or one of the batches, or puts out values that are
            not finite, or if every layer is refuted; likewise.
    """
    refuse_no_model(model)
    refuse_compiled(model)
    check_mode(mode, batches, max_error, example, redraw)
    _check_numbers(eps, n_layers, generator)
    if mode != "observe":
        refuse_wrapped(model)
    plan = _plan(model, include, exclude, mode, output, group, alpha_init, output_alpha_init, n_layers, eps)
    if mode == "observe" and batches is not None:
        return observe_trained(plan, batches)
    if mode == "reinit" and not redraw:
        refuse_trained(model, optimizer)
    notes = _notes(plan, optimizer)
    if mode == "calibrate" and batches is not None:
        report, modules = convert_trained(plan, batches, max_error, example)
    else:
        report, modules = convert_new(plan, generator, example)
        notes += _notes_on_a_new_model(plan, report, n_layers)
    watch(model, modules, report.proof)
    mark(model)
    return replace(report, notes=(*report.notes, *notes))


def _plan(
    model: nn.Module,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    mode: str,
    output: str | Sequence[str] | None,
    group: GroupChoice,
    alpha_init: AlphaInit,
    output_alpha_init: float | str,
    n_layers: int | None,
    eps: float,
) -> Plan:
    """Check the arguments and choose the layers; nothing is changed."""
    chosen = {"include": include, "exclude": exclude, "output": output}
    patterns = {argument: as_patterns(given, argument) for argument, given in chosen.items() if given is not None}
    check_choice(group)
    by_pattern = {"alpha_init": alpha_init, "group": group}
    keys = {
        argument: as_patterns(list(given), argument)
        for argument, given in by_pattern.items()
        if isinstance(given, Mapping)
    }
    for argument, given in {**patterns, **keys}.items():
        check_patterns(argument, given, model)
    selection = select(
        model,
        patterns.get("include"),
        patterns.get("exclude", ()),
        output=patterns.get("output"),
        group=group,
        redraw=mode == "reinit",
    )
    depth = n_layers or depth_of(model, selection.blocks) or 1
    plan = Plan(model, selection, _alphas(selection, alpha_init, output_alpha_init, depth), eps, depth)
    plan = plan.without(known_readers(model, selection.linears))
    if not plan.selection.linears and not plan.selection.experts:
        raise ValueError(f"nothing to convert in this {type(model).__name__}: {_summary(plan.selection.kept)}")
    return plan


def _check_numbers(eps: Any, n_layers: Any, generator: Any) -> None:
    if n_layers is not None and (type(n_layers) is not int or n_layers < 1):
        raise ValueError(f"n_layers={n_layers!r}: give the number of blocks, at least 1, or None to count them")
    if not is_size(eps):
        raise ValueError(f"eps={eps!r}: give a number that is not negative, as 1e-6")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator={generator!r}: give a torch.Generator, as torch.Generator().manual_seed(0)")


def _alphas(
    selection: Selection, alpha_init: AlphaInit, output_alpha_init: float | str, depth: int
) -> dict[str, float]:
    """The initial alpha of each layer to convert, by name."""
    chosen = alpha_init if isinstance(alpha_init, Mapping) else {}
    scales = {pattern: _scale("alpha_init", value, depth) for pattern, value in chosen.items()}
    other = _scale("alpha_init", "one" if isinstance(alpha_init, Mapping) else alpha_init, depth)
    output = _scale("output_alpha_init", output_alpha_init, depth)
    return {
        name: next(
            (value for pattern, value in scales.items() if matches(name, [pattern])),
            output if name in selection.outputs else other,
        )
        for name in [*selection.linears, *selection.experts]
    }


def _scale(argument: str, value: float | str, n_layers: int) -> float:
    if isinstance(value, str):
        if value not in SCALES:
            raise ValueError(f"{argument}={value!r} is not a named scale: give a number or one of {list(SCALES)}")
        return SCALES[value](n_layers)
    if not is_finite(value):
        raise ValueError(f"{argument}={value!r}: give a finite number, or one of {list(SCALES)}")
    return float(value)


def _notes(plan: Plan, optimizer: torch.optim.Optimizer | None) -> list[str]:
    model, selection = plan.model, plan.selection
    notes = list(selection.notes)
    if not selection.has_head:
        notes.append("no head found: if a converted layer gives the model's outputs, name it in exclude")
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        notes.append(
            "nn.MultiheadAttention reads its matrices without calling a layer, so none of them is converted: "
            "write q, k, v and the output projection as nn.Linear to convert them"
        )
    before = [one for _, one in converted_in(model) if not isinstance(one, SDDLinear) or one.paper_draw]
    if before:
        notes.append(
            f"{counted(len(before), 'layer')} of an earlier conversion, not in this report: for a description of all, "
            "keep both reports and apply them in turn"
        )
    if optimizer is not None:
        notes.append("the optimiser does not hold the new alphas: build it anew, or add them as a group of its own")
    return notes


def _notes_on_a_new_model(plan: Plan, report: ConversionReport, n_layers: int | None) -> list[str]:
    """What matters where alphas are not fitted and training starts from scratch."""
    model, selection, notes = plan.model, plan.selection, []
    if not selection.outputs:
        notes.append("no projection was found that writes to the residual stream: name them in output")
    elif not any(layer.is_output for layer in report.converted):
        notes.append("no projection that writes to the residual stream is converted: those that were found stay")
    elif n_layers is None and depth_of(model, selection.blocks) is None:
        notes.append("no list of blocks found, so L = 1: give n_layers if the model has blocks")
    if any(linear.weight.is_meta for linear in selection.linears.values()):
        notes.append(
            "some layers are on the meta device, where nothing is drawn: after to_empty, call the reset_parameters of "
            "every module that has one"
        )
    return notes + advice.notes(model, set(selection.linears.values()), selection.outside)


def _summary(kept: Sequence[KeptLayer]) -> str:
    counts: Mapping[str, int] = Counter(layer.reason for layer in kept)
    if not counts:
        return "it has no nn.Linear and no other matrix"
    return "; ".join(f"{count} x {reason}" for reason, count in counts.items())
