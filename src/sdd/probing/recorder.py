"""One probed step: hooks, probe points and intercepted calls of attention, turned into sums."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdd import probe_points
from sdd.nn import SDDExpertLinear, SDDLinear
from sdd.probing.attention import AttentionCalls, sampled_attention
from sdd.probing.probe_file import layer_name
from sdd.probing.sums import Key, StepSums, sum_of_squares
from sdd.probing.watched import WatchedModules, first_tensor, is_norm, norm_ratio


class Recorder:
    """Hooks a model for the time of one step and sums up what passes; a `sdd.probe_points.Listener`.

    It records forward passes that will be differentiated, but not the recomputation of activation checkpointing inside
    the backward pass. It changes no tensor and draws no random number. While it is open, nothing compiled runs,
    because compiled graphs do not call hooks and would be compiled again for them.

    Args:
        watched: the model's modules.
        sums: receives the sums.
    """

    def __init__(self, watched: WatchedModules, sums: StepSums) -> None:
        self._watched, self._sums = watched, sums
        self._names = watched.names
        self._open = ExitStack()
        self._is_open = False
        self._inside: list[nn.Module] = []  # the modules whose forward is under way, outermost first
        self._calls = ExitStack()  # holds AttentionCalls while some forward is under way
        self._reporting: set[nn.Module] = set()  # modules that reported q and k themselves in this step

    def open(self) -> None:
        """Install hooks, points and the interception of attention."""
        handles = [module.register_forward_pre_hook(self._entered) for module in self._names]
        for module in self._watched.recorded:
            if not isinstance(module, (SDDLinear, SDDExpertLinear)):
                handles.append(module.register_forward_hook(self._left_recorded))
        for index, block in enumerate(self._watched.blocks):
            handles.append(block.register_forward_hook(partial(self._left_block, index), with_kwargs=True))
        handles += [module.register_forward_hook(self._left, always_call=True) for module in self._names]
        for handle in handles:
            self._open.callback(handle.remove)
        probe_points.add(self)
        self._open.callback(probe_points.remove, self)
        _eager.hold()
        self._open.callback(_eager.release)
        self._is_open = True

    def close(self) -> None:
        """Remove everything that `open` installed."""
        self._is_open = False
        self._open.close()
        self._inside.clear()  # a KeyboardInterrupt skips the hooks that would have emptied it
        self._calls.close()

    def __deepcopy__(self, _: object) -> "Recorder":
        """A closed recorder, for a model that is copied within a step together with its hooks."""
        return Recorder(self._watched, self._sums)

    def keys(self) -> list[Key]:
        """The keys of all sums that the model's modules can give, whether or not they were called here."""
        names = [self._names[module] for module in self._watched.recorded]
        return [(name, stat) for name in names for stat in ("rms", "grad_rms")]

    # probe points

    def output(self, where: nn.Module | str, y: Tensor) -> None:
        """Record an output: its sum of squares, and that of its gradient."""
        name = where if isinstance(where, str) else self._names.get(where)
        if self._inside and name is not None and self._is_recorded():
            self._output(name, y)

    def projection(self, module: nn.Module, z: Tensor, y: Tensor) -> None:
        """Record the output of an SDD layer and the ratio of eps to the mean square under its norm."""
        name = self._names.get(module)
        if name is not None and self._is_recorded():
            self._output(name, y)
            self._norm(name, module, z)

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Record a module that reports q and k itself; its calls of SDPA are then not intercepted."""
        if module in self._names and self._is_recorded():
            self._reporting.add(module)
            self._watched.reports_attention = True
            self._attention(self._names[module], q, k, mask, mask is None, None)

    # hooks

    def _entered(self, module: nn.Module, _args: Any) -> None:
        if not self._is_open:
            return
        if not self._inside and not self._watched.reports_attention:
            self._calls.enter_context(AttentionCalls(self._attention_call))
        self._inside.append(module)

    def _left(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._inside:
            self._inside.pop()
            if not self._inside:
                self._calls.close()

    def _left_recorded(self, module: nn.Module, args: Any, output: Any) -> None:
        y = first_tensor(output)
        if y is None or not self._is_recorded():
            return
        name, x = self._names[module], first_tensor(args)
        self._output(name, y)
        if x is not None and is_norm(module):
            self._norm(name, module, x)

    def _left_block(self, index: int, _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        y = first_tensor(output)
        if y is None or not self._is_recorded():
            return
        x = next((x for x in map(first_tensor, (*args, *kwargs.values())) if x is not None), None)
        if x is not None and index == 0:
            self._output(layer_name(0), x)
        if x is not None and x.shape == y.shape:
            self._cosine(index, x, y)
        self._output(layer_name(index + 1), y)

    def _attention_call(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        module = self._inside[-1]
        if module not in self._reporting and q.ndim <= 4 and self._is_recorded():
            self._attention(self._names[module], q, k, mask, causal, scale)

    def _is_recorded(self) -> bool:
        """Whether the present forward pass will be differentiated and is not a recomputation.

        A forward pass within a backward pass is activation checkpointing at work.
        """
        return self._is_open and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

    # sums, of detached tensors

    def _output(self, name: str, y: Tensor) -> None:
        self._squares((name, "rms"), y)
        if y.requires_grad:
            y.register_hook(partial(self._squares, (name, "grad_rms")))

    def _squares(self, key: Key, tensor: Tensor) -> None:
        self._sums.add(key, sum_of_squares(tensor), tensor.numel())

    def _norm(self, name: str, module: nn.Module, z: Tensor) -> None:
        ratio = norm_ratio(module, z.detach())
        if ratio is not None and ratio.numel():  # an expert may have no tokens
            self._sums.add((name, "eps_ratio"), ratio.sum(), ratio.numel())
            self._sums.include((name, "eps_ratio_max"), ratio.amax())

    def _cosine(self, index: int, x: Tensor, y: Tensor) -> None:
        x, y = x.detach().float(), y.detach().float()
        lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        cosine = torch.linalg.vecdot(x, y) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
        self._sums.add((layer_name(index), "cosine"), cosine.sum(), cosine.numel())

    def _attention(
        self, name: str, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> None:
        with torch.autocast(q.device.type, enabled=False):
            largest, entropy, rows = sampled_attention(q, k, mask, causal, scale)
        self._sums.include((name, "logit_max"), largest)
        self._sums.add((name, "entropy"), entropy, rows)


class _Eager:
    """Keeps torch.compile from running anything compiled while there is a holder."""

    def __init__(self) -> None:
        self._holders = 0
        self._stance = ExitStack()

    def hold(self) -> None:
        """Add a holder."""
        if not self._holders:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._holders += 1

    def release(self) -> None:
        """Remove a holder; holders may leave in any order."""
        self._holders -= 1
        if not self._holders:
            self._stance.close()


_eager = _Eager()
