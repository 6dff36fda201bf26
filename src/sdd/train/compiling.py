"""Whether a run is compiled: `compile: auto` becomes true where that pays and works on this machine, else false.

Whether it pays is a pure function of the config, the kind of device, and the numbers of threads and processes:

    seconds saved    SAVED * training tokens * n_layers * d_model / (threads * processes)
    seconds taken    BASE + PER_LAYER * n_layers, the forward pass of evaluations included

Compiled code saves work between matrix products, so what it saves grows with the elements of the residual stream.
Compiling pays if it saves at least MARGIN times what it takes. The numbers for a CPU are from
benchmarks/results/compile_pays_cpu.json (`./dev bench compile_pays`); those for a GPU are assumed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdd.errors import UserError, is_out_of_memory, one_line
from sdd.terminal import clock
from sdd.train.config import RunConfig
from sdd.train.parallel import World, pick_autocast, pick_device

#: Saved over taken, from which on compiling pays: what is saved is not known exactly.
MARGIN = 1.5
_BASE, _PER_LAYER, _PER_MOE_LAYER = 35.0, 3.0, 6.0  # seconds
_CPU_SAVED = 45e-9  # seconds an element of one layer
_CPU_MOE = 4.0  # times as much in a mixture of experts
_GPU_SAVED = 25e-12
_GPU_LAYER = 0.5e-3  # the least that a GPU saves in one layer of one pass: the time of launches


@dataclass(frozen=True)
class Estimate:
    """What compiling a run saves and takes, in seconds.

    Attributes:
        saved: in all training steps.
        taken: by compilation.
    """

    saved: float
    taken: float

    @property
    def pays(self) -> bool:
        """Whether compiling pays."""
        return self.saved >= MARGIN * self.taken


def estimate(config: RunConfig, device: str, *, bfloat16: bool = False, threads: int, processes: int = 1) -> Estimate:
    """Estimate what compiling a run saves and takes.

    Args:
        config: the run.
        device: the kind, "cpu" for instance.
        bfloat16: whether it runs under autocast. On a CPU compiled code is not faster then.
        threads: CPU threads of a process.
        processes: that share the run.
    """
    model = config.model
    layers = config.steps * model.n_layers
    elements = layers * config.tokens_per_step * model.d_model / processes
    if device == "cpu":
        factor = 0.0 if bfloat16 else 1.0 if model.moe is None else _CPU_MOE
        saved = factor * _CPU_SAVED * elements / threads
    else:
        saved = max(_GPU_SAVED * elements, _GPU_LAYER * layers * max(1, config.accumulate // processes))
    per_layer = _PER_LAYER if model.moe is None else _PER_MOE_LAYER
    return Estimate(saved, _BASE + per_layer * model.n_layers)


def decide(config: RunConfig, world: World) -> tuple[RunConfig, str | None]:
    """Decide whether a run is compiled. All processes must call it, and decide alike.

    Returns:
        The config with compile true or false, and one line about what "auto" became; None if the config had said it.

    Raises:
        UserError: if compile is true and nothing can be compiled here.
    """
    if config.compile is False:
        return config, None
    if config.compile == "auto" and config.model.statistics != "float32":
        return replace(config, compile=False), "not compiled: that would keep what model.statistics=bfloat16 rounds"
    device = world.together(lambda: world.place(pick_device(config.device)))
    if config.compile is True:
        if reason := _first(why_not(device), world):
            raise refusal(reason)
        return config, None
    found = world.on_main(lambda: _estimate_here(config, device, world.size))
    numbers = f"about {clock(found.taken)} and save{{}} {clock(found.saved)}"
    if not found.pays:
        line = f"not compiled: that would take {numbers.format('')} (--compile true does it all the same)"
        return replace(config, compile=False), line
    if reason := _first(why_not(device), world):
        return replace(config, compile=False), f"not compiled: {reason}"
    return replace(config, compile=True), f"compiled: that takes {numbers.format('s')} (--compile false leaves it)"


def _estimate_here(config: RunConfig, device: torch.device, processes: int) -> Estimate:
    bfloat16 = pick_autocast(config.precision, device) is not None
    threads = config.threads or torch.get_num_threads()
    return estimate(config, device.type, bfloat16=bfloat16, threads=threads, processes=processes)


def why_not(device: torch.device) -> str | None:
    """Why torch.compile does not work on this device, in a few words; None if it does. Compiles a tiny function."""
    fresh = time.time_ns() % 1_000_003 + 0.5  # another constant each time, so that no cache answers for the compiler
    try:
        torch.compile(lambda x: (x * fresh).relu() + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        return _reason(error)
    return None


def failure(warm_up: Callable[[], None], world: World) -> str | None:
    """Call what compiles a model, and return why that failed, on all processes alike; None if it did not."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second, and by now it is there

    reason = None
    try:
        warm_up()
    except TorchDynamoException as error:
        if is_out_of_memory(error):
            raise
        reason = _reason(error)
    return _first(reason, world)


def refusal(reason: str) -> UserError:
    """The error for a run that the user wants compiled and that cannot be."""
    return UserError(f"compile=true, but {reason}: choose compile=false, or auto")


def _first(reason: str | None, world: World) -> str | None:
    """The reason of the lowest rank that has one."""
    return next((each for each in world.gather(reason) if each), None)


def _reason(error: Exception) -> str:
    """A compiler's error in one line: the first line of what the compiler printed, or else of the message."""
    text = str(error)
    line = next(filter(None, text.rpartition("Output:\n")[2].splitlines()), type(error).__name__)
    reason = f"torch.compile does not work here ({one_line(line)[:160]})"
    folder = Path(torch.__file__).parent
    if " " in str(folder):
        reason += f"; torch lies in {one_line(folder)}, and its compiler call breaks at the space"
    return reason
