"""Hooks that wait for layers which no pass has reached yet, and then remove themselves."""

import functools
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sdd.conversion.experts import SDDModule, matrices
from sdd.conversion.proof import Call, Proof, prove
from sdd.conversion.state import is_ours
from sdd.conversion.table import collapse

_log = logging.getLogger(__name__)


def watch(model: nn.Module, layers: Mapping[str, SDDModule], proof: Proof | None) -> None:
    """Wait for what the proof did not reach, or without a proof for the first pass; not where nothing can run."""
    if proof is None and not any(v.is_meta for layer in layers.values() for v, _ in matrices(layer)):
        Watch(model, layers, decide=False)
    missing = {} if proof is None else {name: layers[name] for name in proof.named("not reached") if name in layers}
    if missing:
        Watch(model, missing, decide=True)


class Watch:
    """What the hooks on a converted model do; copied and pickled with it.

    Under torch.compile and torch.export the hooks do nothing.

    Args:
        model: the whole converted model.
        layers: the layers to wait for, by name.
        decide: True to prove each layer on the pass that calls it first; False to name, in a warning at the end of the
            first pass, the layers that it did not call.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SDDModule], decide: bool) -> None:
        self.pending, self.decide = dict(layers), decide
        self.called: list[str] = []
        self.inner: list[Any] = []
        self.outer = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]

    def before(self, model: nn.Module, args: Any) -> None:
        """Watch the layers during this pass."""
        if torch.compiler.is_compiling() or is_ours():
            return
        self._remove(self.inner)
        self.called = []
        self.inner = [
            layer.register_forward_hook(functools.partial(self._call, name)) for name, layer in self.pending.items()
        ]

    def _call(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if name not in self.called:
            self.called.append(name)

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Name or decide layers, unless the pass failed."""
        if torch.compiler.is_compiling() or is_ours():
            return
        self._remove(self.inner)
        if output is None:
            return
        if self.decide:
            reached = {name: self.pending.pop(name) for name in self.called}
            if reached:
                _decide(model, reached, Call(args, kwargs))
        else:
            uncalled = [name for name in self.pending if name not in self.called]
            self.pending.clear()
            if uncalled:
                _name(uncalled)
        if not self.pending:
            self._remove(self.outer)

    @staticmethod
    def _remove(handles: list[Any]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()


def _name(uncalled: Iterable[str]) -> None:
    warnings.warn(
        f"the first forward pass did not call these layers converted by sdd: {_short(uncalled)}. Either it had no use "
        "for them, or the model reads their weights itself and leaves the norm out: report.verify(model, batch) tells",
        stacklevel=4,
    )


def _decide(model: nn.Module, layers: Mapping[str, SDDModule], call: Call) -> None:
    """Prove layers on the pass that has just reached them; training goes on with the same bits."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return _log.warning("called for the first time, not checked in a run of several processes: %s", _short(layers))
    try:
        proof = prove(model, layers, call, modes=(model.training,), grad=torch.is_grad_enabled())
    except Exception as error:  # the user's training must not end here
        return _log.warning("called for the first time, not checked (%s): %s", error, _short(layers))
    for name, reason in proof.named("refuted").items():
        warnings.warn(f"{name}, converted by sdd, does not work as an SDD layer: {reason}. Exclude it", stacklevel=4)
    others = [name for name in layers if name not in proof.named("refuted")]
    if others:
        _log.info("called for the first time: %s; %s", _short(others), str(proof).partition("\n")[0])
    return None


def _short(names: Iterable[str]) -> str:
    return ", ".join(name for (name,) in collapse((name,) for name in names))
