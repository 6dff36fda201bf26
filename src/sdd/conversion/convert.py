"""`sdd.convert`: turn the layers of a model that was written without SDD into SDD layers."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sdd.conversion.guards import refuse_trained, refuse_wrapped
from sdd.conversion.known import known_readers
from sdd.conversion.match import OUTPUTS, Selection, as_patterns, check_patterns, matches, select
from sdd.conversion.report import ConversionReport, ConvertedLayer, KeptLayer
from sdd.conversion.trial import Trial
from sdd.conversion.watch import Watch
from sdd.nn import SDDLinear
from sdd.placement import SCALES


def convert(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mode: Literal["reinit"] = "reinit",
    *,
    output: str | Sequence[str] | None = None,
    alpha_init: float | str = "one",
    output_alpha_init: float | str = "1/sqrt(L)",
    n_layers: int | None = None,
    eps: float = 1e-6,
    generator: torch.Generator | None = None,
    example: Any = None,
    redraw: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> ConversionReport:
    r"""Turn the `nn.Linear` layers of a model into `SDDLinear`, in place, redrawn for training from scratch.

    Each converted layer computes `alpha * norm(V x) + b` where it computed `W x + b`. With in_features N,

        V ~ N(0, 1/sqrt(2.5 N)) truncated at 3 std,    b = 0,    alpha = alpha_init, or output_alpha_init

    as arXiv 2502.15499 does. Embeddings, norms and the layers that stay keep their values: give a new model, and
    convert it before building the optimiser, compiling, or sharding. `print(sdd.convert(model))` shows what was done.

    With an example, the model is run to prove that it calls each converted layer and reads its weight nowhere else;
    see `sdd.conversion.prove`. A layer that is refuted is put back bit for bit, with the reason in the report. One that
    the example does not reach stays converted, is named, and is decided at its first call. The proof leaves nothing
    behind; while it runs it needs the memory of two more copies of the model. Without an example, a warning at the end
    of the first forward pass names the layers that it did not call.

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
        mode: "reinit", the only one in this version.
        output: patterns of the projections that write to the residual stream; None for the names that published
            models give them (o_proj, down_proj, c_proj, fc2, ...).
        alpha_init: initial alpha of the other layers: a number, or a named function of L (`sdd.placement.SCALES`).
        output_alpha_init: initial alpha of the output projections, likewise.
        n_layers: L; None for the length of the longest list of blocks of one type.
        eps: added to the mean square of `V x`, inside the root.
        generator: for a reproducible draw; layers are drawn in the model's order, on the generator's device.
        example: one batch to prove the conversion on: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments.
        redraw: convert a model that shows signs of training: a config that was loaded, a gradient, or an optimiser
            with state. What its converted layers have learned is lost.
        optimizer: the model's optimiser, if there is one, to be asked whether it has taken steps.

    Returns:
        The report: converted and kept layers, L, what was proven, and notes.

    Raises:
        ValueError: if mode or a named scale is unknown, n_layers is below 1, a pattern fits no `nn.Linear`, or nothing
            is left to convert; the model is then unchanged.
        UserError: if the model shows signs of training and redraw is not given, is in DistributedDataParallel or
            sharded, or refuses the example, or if every layer is refuted; the model is then unchanged.
    """
    if mode != "reinit":
        raise ValueError(f"mode={mode!r}: this version offers 'reinit' (new values, for training from scratch)")
    chosen = {"include": include, "exclude": exclude, "output": output}
    patterns = {argument: as_patterns(given) for argument, given in chosen.items() if given is not None}
    for argument, given in patterns.items():
        check_patterns(argument, given, model)
    if n_layers is not None and n_layers < 1:
        raise ValueError(f"n_layers={n_layers}: give the number of blocks, at least 1, or None to count them")
    refuse_wrapped(model)
    if mode == "reinit" and not redraw:
        refuse_trained(model, optimizer)
    selection = _without_known(model, select(model, patterns.get("include"), patterns.get("exclude", ())))
    if not selection.linears:
        raise ValueError(f"nothing to convert in this {type(model).__name__}: {_summary(selection.kept)}")
    depth = n_layers if n_layers is not None else max(selection.blocks.values(), default=1)
    scales = (_scale("alpha_init", alpha_init, depth), _scale("output_alpha_init", output_alpha_init, depth))
    parameters = sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
    trial = None if example is None else Trial(model, example)
    converted, layers = [], {}
    for name, linear in selection.linears.items():
        is_output = matches(name, patterns.get("output", OUTPUTS))
        layer = layers[name] = _become_sdd(linear, scales[is_output], eps)
        _reinit(layer, generator)
        converted.append(ConvertedLayer(name, (layer.out_features, layer.in_features), scales[is_output], is_output))
    _leave_fused_inference(model)
    depth_guessed = n_layers is None and any(layer.is_output for layer in converted)
    notes = _notes(model, selection, depth_guessed)
    if optimizer is not None:
        notes.append("the optimiser does not hold the new alphas: build it anew")
    redrawn = not any(linear.weight.is_meta for linear in selection.linears.values())
    report = ConversionReport(tuple(converted), tuple(selection.kept), depth, tuple(notes), redrawn, parameters)
    return _proven(model, report, layers, trial)


def _without_known(model: nn.Module, selection: Selection) -> Selection:
    known = known_readers(model, selection.linears)
    linears = {name: linear for name, linear in selection.linears.items() if name not in known}
    return replace(selection, linears=linears, kept=[*selection.kept, *(KeptLayer(*item) for item in known.items())])


def _proven(
    model: nn.Module, report: ConversionReport, layers: Mapping[str, SDDLinear], trial: Trial | None
) -> ConversionReport:
    """The report with what the trial found, or hooks on the model that name what its first pass does not reach."""
    if trial is None:
        if report.redrawn:
            Watch(model, layers, decide=False)
        return report
    proof = trial.prove(layers)
    refuted = proof.named("refuted")
    missing = {name: layers[name] for name in proof.named("not reached")}
    if missing:
        Watch(model, missing, decide=True)
    return replace(
        report,
        converted=tuple(layer for layer in report.converted if layer.name not in refuted),
        kept=(*report.kept, *(KeptLayer(name, f"refuted: {reason}") for name, reason in refuted.items())),
        proof=proof,
    )


def _scale(argument: str, value: float | str, n_layers: int) -> float:
    if isinstance(value, str):
        if value not in SCALES:
            raise ValueError(f"{argument}={value!r} is not a named scale: give a number or one of {list(SCALES)}")
        return SCALES[value](n_layers)
    return float(value)


def _become_sdd(linear: nn.Linear, alpha_init: float, eps: float) -> SDDLinear:
    """Change the layer's class in place, as torch's parametrisations do.

    A new module would lose hooks, second names, and references held outside the module tree.
    """
    layer: Any = linear
    layer.__class__ = SDDLinear
    layer._add_norm(None, False, alpha_init, eps)
    return layer


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


def _leave_fused_inference(model: nn.Module) -> None:
    """Switch off the fused inference path of nn.TransformerEncoder, which reads converted weights as plain ones."""
    for module in model.modules():
        if not any(isinstance(inner, SDDLinear) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the path requires it to be 1 or 2
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


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
