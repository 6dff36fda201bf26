"""The learning-rate schedule: its formula, and how it is fitted to the length of a new run."""

import math
from collections.abc import Collection
from dataclasses import replace

from sdd.errors import UserError
from sdd.train.config import OptimConfig, RunConfig

#: A fraction times a number of steps may miss a whole number of steps by a rounding error.
_ROUNDING = 1e-6


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of one step, a pure function of the step.

    Warm-up rises linearly and reaches lr at step `warmup`. After it,

        cosine     lr * (f + (1 - f) * (1 + cos(pi * p)) / 2),   p from 0 after warm-up to 1 at the last step
        wsd        lr, then linear to f * lr over the last decay_fraction of the steps (arXiv 2404.06395)
        constant   lr
        ramp       lr * r ^ ((steps - step) / (steps - 1)), which rises geometrically from r * lr at step 1 to lr at
                   the last; no warm-up

    with f = final_lr and r = first_lr. Without warm-up, cosine has its peak before the first step. Numbers that do not
    fit the run (see `fit`) keep this formula, so that old runs keep their rates: a run no longer than its warm-up ends
    during it.

    Args:
        config: the optimiser's settings.
        step: from 1 to `steps`.
        steps: length of the run.
    """
    if step < config.warmup and config.schedule != "ramp":
        return config.lr * step / config.warmup
    match config.schedule:
        case "ramp":
            return config.lr * config.first_lr ** ((steps - step) / max(steps - 1, 1))
        case "constant":
            return config.lr
        case "cosine":
            progress = _ramp(step, config.warmup, steps)
            return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)
        case "wsd":  # warm-up, stable, decay
            progress = _ramp(step, steps - config.decay_fraction * steps, steps)
            return config.lr * (1 - (1 - config.final_lr) * progress)


def misfit(config: RunConfig) -> str | None:
    """One line about numbers that do not fit the length of a run that keeps them; None if all do."""
    try:
        fit(config, ("optim.warmup", "optim.decay_fraction"))
    except UserError as error:
        return f"{error}; the run keeps its schedule all the same"
    return None


def _ramp(step: int, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, linear between."""
    return min(1.0, max(0.0, (step - start) / max(end - start, 1)))


def fit(config: RunConfig, given: Collection[str]) -> tuple[RunConfig, str | None]:
    """Fit the schedule to the length of a new run, so that it reaches its peak and then its final rate.

    Warm-up must end where the decay begins or before, and the decay of cosine and wsd takes at least one step. The
    numbers that the user did not give make room for those given: warm-up takes at most half of the steps, and the decay
    of wsd the steps after warm-up or less. A ramp leaves no step for warm-up.

    Args:
        config: the run.
        given: dotted names of the fields that the user gave. They stay as they are.

    Returns:
        The config, and one line about what has changed; None if nothing has.

    Raises:
        UserError: if a given number cannot fit.
    """
    optim, steps = config.optim, config.steps
    decay = {"constant": 0.0, "cosine": 1.0, "wsd": optim.decay_fraction * steps, "ramp": steps}[optim.schedule]
    fixed_decay = optim.schedule != "wsd" or "optim.decay_fraction" in given
    if fixed_decay and optim.schedule == "wsd" and decay < 1 - _ROUNDING:
        raise UserError(
            f"optim.decay_fraction={optim.decay_fraction} of steps={steps} is less than one step: give at least "
            f"{1 / steps:.3g}"
        )
    room = math.floor(steps - (decay if fixed_decay else 1) + _ROUNDING)
    warmup = optim.warmup if "optim.warmup" in given else min(optim.warmup, steps // 2, room)
    if warmup > room:
        raise UserError(
            f"optim.warmup={warmup} does not fit steps={steps}: the schedule {optim.schedule} leaves at most {room} "
            "steps for warm-up"
        )
    optim = replace(optim, warmup=warmup)
    if not fixed_decay and not 1 - _ROUNDING <= decay <= steps - warmup + _ROUNDING:
        optim = replace(optim, decay_fraction=max(1, min(decay, steps - warmup)) / steps)
    changes = [
        f"optim.{name} {before:g} -> {now:g}"
        for name in ("warmup", "decay_fraction")
        if (before := getattr(config.optim, name)) != (now := getattr(optim, name))
    ]
    line = f"schedule fitted to a run of {steps:,} steps: {', '.join(changes)}" if changes else None
    return replace(config, optim=optim), line
