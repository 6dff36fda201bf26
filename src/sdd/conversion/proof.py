"""The proof that a model uses its SDD layers as what they are, by running it.

For c > 0, `alpha * norm(V x) + b` stays as it is if V becomes c V and eps becomes c^2 eps. With c = 4 no rounding
differs either: the outputs of the model must stay the same bit for bit. They change where its code reads V itself.
"""

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from sdd.conversion.experts import SDDModule, matrices
from sdd.conversion.state import State, as_ours, same_random_numbers
from sdd.conversion.table import collapse, count
from sdd.errors import UserError, one_line
from sdd.nn import SDDLinear
from sdd.terminal import aligned

#: V is multiplied by it, eps by its square.
FACTOR = 4
# Below it, products of denormal numbers round otherwise at another scale. No value that matters is so small, unless
# eps is 0: then squares below 1e-38 are not summed exactly.
_TINY = 2.0**-100
_READ = "the model reads its weight instead of calling the layer"
_READ_TOO = "the model reads its weight beside calling the layer"
_MODES = {True: "in training mode", False: "in evaluation mode"}

Outcome = Literal["proven", "refuted", "not reached", "undecided"]


@dataclass(frozen=True)
class Call:
    """The arguments of one pass, which an example stands for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Refused(UserError):
    """The model raised an error on the example."""


@dataclass(frozen=True)
class Verdict:
    """What the proof found of one converted layer.

    Attributes:
        name: dotted name in the model.
        outcome: "proven"; "refuted": the model uses the layer as something else; "not reached" by the example; or
            "undecided", because the model's outputs cannot be compared.
        reason: why, unless proven.
    """

    name: str
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Proof:
    """What became of every converted layer, in the model's order; `print` shows it.

    Attributes:
        verdicts: one a layer.
    """

    verdicts: tuple[Verdict, ...]

    def named(self, outcome: Outcome) -> dict[str, str]:
        """The layers of one outcome, with the reason."""
        return {verdict.name: verdict.reason for verdict in self.verdicts if verdict.outcome == outcome}

    def __str__(self) -> str:
        outcomes: tuple[Outcome, ...] = ("proven", "refuted", "not reached", "undecided")
        found = {outcome: len(self.named(outcome)) for outcome in outcomes}
        counts = (f"{number} {outcome}" for outcome, number in found.items() if number or outcome == "proven")
        lines = [f"proof: {count(len(self.verdicts), 'layer')}, {', '.join(counts)}"]
        rows = [(verdict.name, verdict.outcome, verdict.reason) for verdict in self.verdicts if verdict.reason]
        if rows:
            lines += ["", *aligned([("layer", "outcome", "reason"), *collapse(rows)])]
        return "\n".join(lines)


def as_call(example: Any) -> Call:
    """The positional and keyword arguments that an example stands for.

    Raises:
        UserError: if it is neither a tensor, nor a tuple, nor a mapping with names as keys.
    """
    if isinstance(example, Call):
        return example
    if isinstance(example, Tensor):
        return Call((example,), {})
    if isinstance(example, tuple):
        return Call(example, {})
    if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        return Call((), dict(example))
    raise UserError(
        f"example is a {type(example).__name__}: give one batch as the model takes it, a tensor, a tuple of positional "
        "arguments, or a mapping of keyword arguments"
    )


class Passes:
    """Passes of a model over one example, after each of which everything is as it was.

    Args:
        model: any module, off the meta device.
        example: see `as_call`.
        state: of the model now; None to take it here.
    """

    def __init__(self, model: nn.Module, example: Any, state: State | None = None) -> None:
        self.model = model
        self.call = as_call(example)
        if any(is_lazy(parameter) for parameter in model.parameters()):
            raise UserError("the model has lazy layers without a shape: run it once, then convert")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError("the model is on the meta device, where no example can run: materialise it first")
        self.state = State(model) if state is None else state

    def run(self, training: bool, layers: Iterable[SDDModule] = (), *, grad: bool = False) -> list[Any]:
        """All tensors and numbers of the outputs, with the scale of these layers changed."""
        with ExitStack() as stack:
            stack.enter_context(same_random_numbers(self.model))
            stack.callback(self.state.restore)
            for layer in layers:
                _rescale(layer)
            return self.forward(training, grad)

    def trace(self, training: bool, layers: Mapping[str, SDDModule], grad: bool) -> "Trace":
        """A pass with everything as it is, in which the layers are watched."""
        called: set[str] = set()
        with ExitStack() as stack:
            stack.enter_context(same_random_numbers(self.model))
            stack.callback(self.state.restore)
            for name, layer in layers.items():
                _watch(layer, functools.partial(called.add, name))
            outputs = self.forward(training, grad)
            rewritten = {
                name for name, layer in layers.items() if any(self.state.changed(v) for v, _ in matrices(layer))
            }
        graph = _leaves_of_graph(outputs)
        outputs = [value.detach() if isinstance(value, Tensor) else value for value in outputs]
        return Trace(outputs, called, rewritten, graph, grad)

    def forward(self, training: bool, grad: bool) -> list[Any]:
        """One pass without autocast and without warnings, which the user's own passes give; nothing is put back."""
        devices = {tensor.device.type for tensor in self.model.parameters()}
        with ExitStack() as stack:
            stack.enter_context(as_ours())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.set_grad_enabled(grad))
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            self.model.train(training)
            try:
                outputs = self.model(*tree_map(_copy, self.call.args), **tree_map(_copy, self.call.kwargs))
            except Exception as error:
                raise Refused(
                    f"the model refuses the example {_MODES[training]} ({type(error).__name__}: "
                    f"{_first_line(error)}): give one batch as the model takes it"
                ) from error
            return list(_values(outputs, set()))


@dataclass(frozen=True)
class Trace:
    """One pass: outputs, layers called, layers whose V the model changed, and parameters in the graph, if kept."""

    outputs: list[Any]
    called: set[str]
    rewritten: set[str]
    graph: set[int] | None
    grad: bool


def prove(
    model: nn.Module,
    layers: Mapping[str, SDDModule],
    example: Any,
    *,
    modes: Sequence[bool] = (True, False),
    grad: bool = True,
) -> Proof:
    """Check that the model uses each converted layer by calling it; the model is left as it was, bit for bit.

    In training mode (with gradients) and in evaluation mode (without): V of all layers becomes 4 V and their eps
    16 eps. If an output changes, halves of the layers are tried until those to blame are found.

    Args:
        model: float32, bfloat16 or float64.
        layers: the SDD layers by name, and modules of converted experts.
        example: one batch; see `as_call`.
        modes: True for training mode, False for evaluation.
        grad: whether the pass in training mode, or the only pass, records gradients.

    Raises:
        UserError: if the model refuses the example, or a layer is float16, where 4 V could overflow.
    """
    half = [name for name, layer in layers.items() if any(v.dtype == torch.float16 for v, _ in matrices(layer))]
    if half:
        raise UserError(f"{half[0]} is float16, where the proof could overflow: convert in float32, then call .half()")
    passes = Passes(model, example)
    refuted: dict[str, str] = {}
    undecided: dict[str, str] = {}
    called: set[str] = set()
    graphs: list[set[int] | None] = []
    for training in modes:
        with_grad = grad and (training or len(modes) == 1)
        trace = passes.trace(training, layers, with_grad)
        called |= trace.called
        graphs += [trace.graph] if with_grad else []
        wrong, unclear = _compare(passes, training, layers, trace)
        refuted = {**wrong, **refuted}
        undecided = {**unclear, **undecided}
    if graphs and len(modes) > 1 and not all(_in_graph(layers[name], graphs) for name in called):
        graphs.append(passes.trace(False, {}, grad=True).graph)  # training may skip layers at random
    verdicts = []
    for name, layer in layers.items():
        outcome, reason = "proven", ""
        in_graph = _in_graph(layer, graphs)
        if name in refuted:
            outcome, reason = "refuted", refuted[name]
        elif not in_graph and _reads(layer, graphs):
            outcome, reason = (
                "refuted",
                "the model reads its weight instead of calling the layer: alpha gets no gradient",
            )
        elif name not in called:
            outcome, reason = "not reached", "not called"
        elif name in undecided:
            outcome, reason = "undecided", undecided[name]
        elif not in_graph:
            outcome, reason = "not reached", "called, but the outputs do not depend on it"
        verdicts.append(Verdict(name, outcome, reason))
    return Proof(tuple(verdicts))


def _compare(
    passes: Passes, training: bool, layers: Mapping[str, SDDModule], trace: Trace
) -> tuple[dict[str, str], dict[str, str]]:
    """The layers that one mode refutes, and those that it cannot decide, with the reasons."""
    mode = _MODES[training]
    refuted = dict.fromkeys(trace.rewritten, f"the model changes its weight in a forward pass, {mode}")
    # The layers not called come first, so that halving separates them: they are the likelier ones.
    names = sorted((name for name in layers if name not in refuted), key=lambda name: name in trace.called)

    def differs(some: Collection[str]) -> bool:
        # with gradients or without as in the trace: torch may choose other kernels
        outputs = passes.run(training, [layers[name] for name in some], grad=trace.grad)
        return not same_outputs(trace.outputs, outputs)

    if not any(isinstance(value, Tensor) and value.isfinite().any() for value in trace.outputs):
        return refuted, dict.fromkeys(names, f"the outputs hold no finite number, {mode}")
    if not names or not differs(names):
        return refuted, {}
    if differs([]):
        return refuted, dict.fromkeys(names, f"the model's outputs differ between two equal passes, {mode}")
    for name in _culprits(names, differs):
        refuted[name] = f"{_READ_TOO if name in trace.called else _READ}, {mode}"
    return refuted, {}


def _culprits(names: list[str], differs: Any) -> list[str]:
    """The names to blame for a difference that all of them together make, found by halving."""
    if len(names) == 1:
        return names
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return [name for half in halves if differs(half) for name in _culprits(half, differs)] or names


def _in_graph(layer: SDDModule, graphs: Sequence[set[int] | None]) -> bool:
    """Whether gradients reach every alpha of a layer in some pass, as far as that can be told."""
    if not graphs or None in graphs:
        return True
    reached: set[int] = set().union(*(graph for graph in graphs if graph is not None))
    return all(not alpha.requires_grad or id(alpha) in reached for _, alpha in matrices(layer))


def _reads(layer: SDDModule, graphs: Sequence[set[int] | None]) -> bool:
    """Whether gradients reach a V of a layer, but not its alpha."""
    reached: set[int] = set().union(*(graph for graph in graphs if graph is not None))
    return any(id(v) in reached and alpha.requires_grad and id(alpha) not in reached for v, alpha in matrices(layer))


def _rescale(layer: SDDModule) -> None:
    """Multiply V by FACTOR and eps by its square, except for rows without a norm."""
    if isinstance(layer, SDDLinear):
        widths = [width for width, _ in layer.parts]
        for rows, (_, group_width) in zip(layer.matrix.data.split(widths), layer.parts, strict=True):
            if group_width:
                rows.mul_(FACTOR)
    else:
        for v, _ in matrices(layer):
            v.data.mul_(FACTOR)
    layer.eps *= FACTOR**2


def _watch(layer: Any, tell: Any) -> None:
    """Call `tell` when the layer's forward is called, by whatever way; the state restored later ends it."""
    forward = layer.forward

    @functools.wraps(forward)
    def told(*args: Any, **kwargs: Any) -> Any:
        tell()
        return forward(*args, **kwargs)

    layer.forward = told


def _leaves_of_graph(outputs: Iterable[Any]) -> set[int] | None:
    """Ids of the parameters that gradients of the outputs reach; None if a checkpoint hides the graph.

    The graph is only walked: a backward pass would fire the user's hooks.
    """
    nodes: list[Any] = [value.grad_fn for value in outputs if isinstance(value, Tensor) and value.grad_fn is not None]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if "CheckpointFunction" in type(node).__name__:
            return None
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def same_outputs(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether the values of two passes are the same: tensors bit for bit, but for denormal numbers."""
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and (a == b or (math.isnan(a) and math.isnan(b)))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=_TINY, equal_nan=True)


def _values(value: Any, seen: set[int]) -> Iterator[Any]:
    """Every tensor and number in a nested structure, objects with attributes included."""
    if isinstance(value, Tensor | bool | int | float):
        yield value
        return
    if value is None or isinstance(value, str | bytes | type | nn.Module) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        inner = [*getattr(value, "__dict__", {}).values(), *(getattr(value, slot, None) for slot in _slots(value))]
    for part in inner:
        yield from _values(part, seen)


def _slots(value: Any) -> Iterator[str]:
    """The names of the attributes that an object's classes keep outside its `__dict__`."""
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return copy.deepcopy(value)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return one_line(text if len(text) <= 200 else text[:200] + "...")
