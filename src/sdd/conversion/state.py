"""The whole state of a model, kept in memory and put back bit for bit."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, list, set)


_ours: ContextVar[bool] = ContextVar("ours", default=False)


def is_ours() -> bool:
    """Whether the present pass of a model is one of a proof or a calibration."""
    return _ours.get()


@contextmanager
def as_ours() -> Iterator[None]:
    """Mark the passes in this thread as those of a proof or a calibration, so that waiting hooks leave them alone."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


class State:
    """The class, attributes and tensors of every module of a model, as they are now.

    Attributes that are containers are kept one level deep. What they hold further down, and what an attribute that is
    another object holds, is not.

    Args:
        model: any module; the state needs the memory of a second copy of it.
        parameters: whether the values of parameters are kept; without them it needs little memory.
    """

    def __init__(self, model: nn.Module, *, parameters: bool = True) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._modules = {module: _ModuleState(module, self._copies, parameters) for module in model.modules()}

    def restore(self, module: nn.Module | None = None) -> None:
        """Put back one module without its children, or all modules."""
        for state in self._modules.values() if module is None else [self._modules[module]]:
            state.restore(self._copies)

    def changed(self, tensor: Tensor) -> bool:
        """Whether a tensor of the model has other bits than it had, or is another one than it was."""
        known = self._copies.get(id(tensor))
        return known is None or not same_bits(*known)


class _ModuleState:
    def __init__(self, module: nn.Module, copies: dict[int, tuple[Tensor, Tensor]], parameters: bool) -> None:
        self.module, self.kind, self.attributes = module, type(module), dict(vars(module))
        self.containers: list[tuple[Any, Any]] = [
            (value, value.copy()) for value in self.attributes.values() if type(value) in _CONTAINERS
        ]
        found = list(self.attributes.values())
        for _, copy in self.containers:
            found += copy.values() if isinstance(copy, dict) else copy
        self.generators = [(put_back, state) for value in found for put_back, state in _generator(value)]
        self.tensors = [value for value in found if isinstance(value, Tensor) and value.layout == torch.strided]
        if not parameters:
            self.tensors = [value for value in self.tensors if not isinstance(value, nn.Parameter)]
        for tensor in self.tensors:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor, tensor.detach().clone()

    def restore(self, copies: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.module.__class__ = self.kind
        _refill(vars(self.module), self.attributes)
        for container, copy in self.containers:
            _refill(container, copy)
        for put_back, state in self.generators:
            put_back(state)
        for tensor in self.tensors:
            copy = copies[id(tensor)][1]
            if same_bits(tensor, copy):
                continue
            # Through .data: autograd must not see a change, since the tensor ends with the bits that it had.
            if tensor.shape == copy.shape and tensor.dtype == copy.dtype and tensor.device == copy.device:
                tensor.data.copy_(copy)
            else:
                tensor.data = copy.clone()


def _generator(value: Any) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """The state of a generator of torch, numpy or Python, and what puts it back; nothing for another value."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        yield value.set_state, value.get_state()
    elif isinstance(value, np.random.Generator):
        yield partial(setattr, value.bit_generator, "state"), value.bit_generator.state
    elif isinstance(value, random.Random):
        yield value.setstate, value.getstate()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, device, shape and values; NaN differs from NaN."""
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Put the random generators of torch, numpy and Python back at the end."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device for device in devices if device.type == "cuda"]))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 (models draw from it)
        yield


def _refill(container: Any, content: Any) -> None:
    """Give a container its former content, in the former order, if it has another."""
    if isinstance(container, dict):
        same = list(container) == list(content) and all(container[key] is content[key] for key in content)
    else:
        same = len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))
    if not same:
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(content)
