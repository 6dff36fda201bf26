"""Several forward passes of one model that stop together at every layer, so that a layer sees all batches at once.

What a calibrated layer puts out is known when all batches have reached it, and no later layer may run before. Each
forward pass therefore is a thread, which a hook holds at every watched layer. One thread runs at a time, so the model
sees what it sees in passes one after the other; only their order differs. The price of a calibration is then two
forward passes a batch, however many layers there are, and the memory of one pass over all batches without gradients.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdd.conversion.state import State, as_ours, same_random_numbers


class Stop(NamedTuple):
    """A call of a layer at which a pass is held.

    Attributes:
        x: its input `[..., in]`.
        y: its output `[..., out]`.
        args: all inputs that were given by place.
        kwargs: all that were given by name.
    """

    x: Tensor
    y: Tensor
    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = {}


#: Answers the stops of all passes at a layer, by pass, with the outputs to go on with; a pass without an answer keeps
#: its own.
Visit = Callable[[str, Mapping[int, Stop]], Mapping[int, Tensor]]

_here = threading.local()


class RefusedBatch(Exception):
    """A forward pass that failed; `index` is its number, and the cause is the model's own exception."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class _Cancelled(BaseException):
    """Ends a pass whose companions failed."""


def call(model: nn.Module, batch: Any) -> Any:
    """Call the model on an example: a mapping gives keyword arguments, a tuple or list positional ones, else one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def in_lockstep(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], visit: Visit) -> None:
    """Run the model on all batches at once, and stop all passes at every call of a layer.

    Where passes stop at different layers (experts without tokens), the layer that stands first in `layers` goes first.
    The model is in evaluation mode meanwhile, without gradients, and the generators are put back.

    Args:
        model: any module; its forward is called once for each batch.
        layers: by name, in the model's order.
        batches: one for each pass, see `call`; the number of a pass is its place.
        visit: is called with a layer's name and the passes that stopped there.

    Raises:
        RefusedBatch: if a forward pass fails.
    """
    with _undisturbed(model), _stops(layers):
        settings = _settings()
        passes = [_Pass(lambda batch=batch: call(model, batch), settings) for batch in batches]
        try:
            _walk(passes, {name: place for place, name in enumerate(layers)}, visit)
        finally:
            for one in passes:
                one.cancel()


def _walk(passes: Sequence["_Pass"], places: Mapping[str, int], visit: Visit) -> None:
    for index in range(len(passes)):
        _advance(passes, index, None)
    while waiting := {index: one for index, one in enumerate(passes) if one.name is not None}:
        name = min((one.name for one in waiting.values() if one.name is not None), key=places.__getitem__)
        there = {index: one.held for index, one in waiting.items() if one.name == name and one.held is not None}
        answers = visit(name, there)
        for index in there:
            _advance(passes, index, answers.get(index))


def _advance(passes: Sequence["_Pass"], index: int, answer: Tensor | None) -> None:
    try:
        passes[index].advance(answer)
    except Exception as error:
        raise RefusedBatch(index) from error


class _Pass:
    """A forward pass in a thread of its own that runs only while `advance` waits for it.

    Attributes:
        name: the layer at which it has stopped; None if it has ended.
        held: the call of that layer.
    """

    def __init__(self, work: Callable[[], Any], settings: Callable[[], ExitStack]) -> None:
        self.name: str | None = None
        self.held: Stop | None = None
        self._work, self._settings = work, settings
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._answer: Tensor | None = None
        self._cancelled = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def advance(self, answer: Tensor | None) -> None:
        """Go on to the next stop, or to the end; raises what the forward pass raises."""
        self._answer, self.held = answer, None
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the pass wherever it stands."""
        if self._thread.is_alive():
            self._cancelled = True
            self._go.release()
            self._thread.join()

    def stop(self, name: str, held: Stop) -> Tensor | None:
        """Called in the thread: wait at a layer until `advance` brings an answer."""
        self.name, self.held = name, held
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled
        return self._answer

    def _run(self) -> None:
        self._go.acquire()
        _here.running = self
        try:
            with self._settings():
                self._work()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.name = self.held = None
            self._stopped.release()


@contextmanager
def _stops(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Hold every pass at the calls of these layers."""

    def stop_at(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor], y: Tensor) -> Any:
            running: _Pass | None = getattr(_here, "running", None)
            if running is None:
                return None
            return running.stop(name, Stop(inputs[0] if inputs else next(iter(named.values())), y, inputs, named))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(stop_at(name), with_kwargs=True).remove)
        yield


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with what the passes change (modes, buffers, attributes, generators) put back at the end."""
    state = State(model, parameters=False)
    try:
        with same_random_numbers(model):
            model.eval()
            yield
    finally:
        state.restore()


def _settings() -> Callable[[], ExitStack]:
    """What torch keeps for each thread, as it is in the present one: autocast and the current GPU."""
    cast = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(as_ours())
        for kind, dtype in cast.items():
            stack.enter_context(torch.autocast(kind, dtype))
        if gpu is not None:
            stack.enter_context(torch.cuda.device(gpu))
        return stack

    return enter
