"""`sdd.convert`: turn the layers of a model that was written without SDD into SDD layers."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from sdd.conversion.become import become_sdd, described, leave_fused_inference
from sdd.conversion.match import OUTPUTS, Selection, as_patterns, check_patterns, matches, select
from sdd.conversion.norms import norms_for
from sdd.conversion.pretrained import mark
from sdd.conversion.report import ConversionReport, KeptLayer
from sdd.conversion.trained import check_mode, convert_trained, observe_trained
from sdd.nn import SDDLinear
from sdd.norm_groups import Group
from sdd.placement import SCALES


def convert(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mode: Literal["reinit", "calibrate", "observe"] = "reinit",
    *,
    output: str | Sequence[str] | None = None,
    alpha_init: float | str = "one",
    output_alpha_init: float | str = "1/sqrt(L)",
    n_layers: int | None = None,
    eps: float = 1e-6,
    generator: torch.Generator | None = None,
    group: Group | Mapping[str, Group] = None,
    batches: Iterable[Any] | None = None,
    max_error: float | None = None,
) -> ConversionReport:
    r"""Turn the `nn.Linear` layers of a model into `SDDLinear`, in place, redrawn for training from scratch.

    Each converted layer computes `alpha * norm(V x) + b` where it computed `W x + b`. With in_features N,

        V ~ N(0, 1/sqrt(2.5 N)) truncated at 3 std,    b = 0,    alpha = alpha_init, or output_alpha_init

    as arXiv 2502.15499 does. Embeddings, norms and the layers that stay keep their values: give a new model, and
    convert it before building the optimiser, compiling, or sharding. `print(sdd.convert(model))` shows what was done.

    A layer stays an `nn.Linear`, with the reason in the report, if

    - it is the head: the model's `get_output_embeddings()`, or a layer named like one (lm_head, head, classifier, ...)
      outside the blocks; or it is a router of experts: named so, or a `gate` beside experts. These are guesses. To
      overrule them, name the layer in `include` by its full name, without wildcards;
    - another module owns its weight or bias too (tied to the embedding);
    - it computes something else than `W x + b` from its parameters: a subclass of `nn.Linear` (quantised, LoRA, the
      out-projection of `nn.MultiheadAttention`), a parametrised layer, a weight that is no plain floating parameter,
      or a forward that was replaced;
    - it has one output feature, of which a norm would keep only the sign.

    Every converted layer remains the same object. Its parameters, hooks, training flag, device, dtype and second names
    stay. Only its class changes (`SDDLinear` is not an `nn.Linear`), and alpha is added: float32 in a half-precision
    model, requires_grad as the weight's. Code that reads `.weight` without calling the layer would compute `V x`
    without the norm. Torch has one such case, the fused inference path of `nn.TransformerEncoder`; it is switched off
    where it would read a converted layer. On the meta device nothing is drawn.

    Args:
        model: any module.
        include: glob patterns (`fnmatch`, `*` crosses dots) of the layers to convert; None for all. A pattern fits a
            full dotted name or its ending after a dot: "q_proj", "mlp.*", "*.layers.0.*".
        exclude: patterns of the layers to leave; it wins over `include`.
        mode: "reinit" draws new values, as above. "calibrate" is for a trained model: it keeps W as V and b, bit for
            bit, and fits alpha to the outputs on a few `batches`, see `sdd.conversion.calibrate`; a layer that they
            do not reach stays. "observe" changes nothing: the report says how the scale of each layer's output
            behaves on `batches`, and what calibration would cost.
        output: patterns of the projections that write to the residual stream; None for the names that published
            models give them (o_proj, down_proj, c_proj, fc2, ...).
        alpha_init: initial alpha of the other layers: a number, or a named function of L (`sdd.placement.SCALES`).
        output_alpha_init: initial alpha of the output projections, likewise.
        n_layers: L; None for the length of the longest list of blocks of one type.
        eps: added to the mean square of `V x`, inside the root.
        generator: for a reproducible draw; layers are drawn in the model's order, on the generator's device.
        group: norm groups as in `SDDLinear`, for all layers or by pattern: `{"q_proj": 64, "k_proj": 64}`.
        batches: for "calibrate" and "observe", examples of what the model was trained on: tensors, tuples of
            arguments, or mappings of keyword arguments. All are in memory at once, as one batch without gradients.
        max_error: for "calibrate", the largest median error a token with which a layer is converted.

    Returns:
        The report: converted and kept layers, L, and notes.

    Raises:
        ValueError: if mode or a named scale is unknown, n_layers is below 1, a pattern fits no `nn.Linear`, a group
            does not fit, nothing is left to convert, or arguments do not fit the mode; the model is then unchanged.
        UserError: if the model refuses one of the batches, or puts out values that are not finite; likewise.
    """
    check_mode(mode, batches, max_error)
    chosen = {"include": include, "exclude": exclude, "output": output}
    patterns = {argument: as_patterns(given) for argument, given in chosen.items() if given is not None}
    for argument, given in patterns.items():
        check_patterns(argument, given, model)
    if n_layers is not None and n_layers < 1:
        raise ValueError(f"n_layers={n_layers}: give the number of blocks, at least 1, or None to count them")
    selection = select(model, patterns.get("include"), patterns.get("exclude", ()))
    if not selection.linears:
        raise ValueError(f"nothing to convert in this {type(model).__name__}: {_summary(selection.kept)}")
    depth = n_layers if n_layers is not None else max(selection.blocks.values(), default=1)
    scales = (_scale("alpha_init", alpha_init, depth), _scale("output_alpha_init", output_alpha_init, depth))
    norms = norms_for(selection.linears, group, eps)
    if mode == "observe" and batches is not None:
        return observe_trained(model, selection, norms, batches, depth)
    if mode == "calibrate" and batches is not None:
        outputs = {name for name in selection.linears if matches(name, patterns.get("output", OUTPUTS))}
        report = convert_trained(model, selection, norms, batches, max_error, outputs, depth)
        leave_fused_inference(model)
        mark(model)
        return replace(report, notes=(*report.notes, *_notes(model, selection, False)))
    converted = []
    for name, linear in selection.linears.items():
        is_output = matches(name, patterns.get("output", OUTPUTS))
        layer = become_sdd(linear, norms[name], scales[is_output])
        _reinit(layer, generator)
        converted.append(described(name, layer, is_output))
    leave_fused_inference(model)
    depth_guessed = n_layers is None and any(layer.is_output for layer in converted)
    notes = _notes(model, selection, depth_guessed)
    report = ConversionReport(tuple(converted), tuple(selection.kept), depth, tuple(notes))
    mark(model)
    return report


def _scale(argument: str, value: float | str, n_layers: int) -> float:
    if isinstance(value, str):
        if value not in SCALES:
            raise ValueError(f"{argument}={value!r} is not a named scale: give a number or one of {list(SCALES)}")
        return SCALES[value](n_layers)
    return float(value)


@torch.no_grad()
def _reinit(layer: SDDLinear, generator: torch.Generator | None) -> None:
    std = 1 / math.sqrt(2.5 * layer.in_features)
    weight = layer.weight
    # Drawn in float32 and then rounded, so that a seed gives a half-precision model the values of the float32 one.
    drawn = torch.empty(
        weight.shape,
        dtype=torch.promote_types(weight.dtype, torch.float32),
        device=weight.device if generator is None else generator.device,
    )
    weight.copy_(nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator))
    if layer.bias is not None:
        layer.bias.zero_()


def _notes(model: nn.Module, selection: Selection, depth_guessed: bool) -> list[str]:
    notes = []
    if depth_guessed and not selection.blocks:
        notes.append("no list of blocks found, so L = 1: give n_layers if the model has blocks")
    if not selection.has_head:
        notes.append("no head found: if a converted layer gives the model's outputs, name it in exclude")
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        notes.append(
            "nn.MultiheadAttention reads its matrices without calling a layer, so none of them is converted: "
            "write q, k, v and the output projection as nn.Linear to convert them"
        )
    if any(linear.weight.is_meta for linear in selection.linears.values()):
        notes.append(
            "some layers are on the meta device, where nothing is drawn: convert after materialising the model"
        )
    return notes


def _summary(kept: Sequence[KeptLayer]) -> str:
    counts: Mapping[str, int] = Counter(layer.reason for layer in kept)
    if not counts:
        return "it has no nn.Linear and no other matrix"
    return "; ".join(f"{count} x {reason}" for reason, count in counts.items())
