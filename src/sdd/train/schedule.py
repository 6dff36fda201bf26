"""The learning rate as a pure function of the step."""

import math

from sdd.train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of one step.

    Warm-up rises linearly and reaches lr at step `warmup`. After it,

        cosine     lr * (f + (1 - f) * (1 + cos(pi * p)) / 2),   p from 0 after warm-up to 1 at the last step
        wsd        lr, then linear to f * lr over the last decay_fraction of the steps (arXiv 2404.06395)
        constant   lr

    with f = final_lr.

    Args:
        config: the optimiser's settings.
        step: from 1 to `steps`.
        steps: length of the run.
    """
    if step < config.warmup:
        return config.lr * step / config.warmup
    match config.schedule:
        case "constant":
            return config.lr
        case "cosine":
            progress = _ramp(step, config.warmup, steps)
            return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)
        case "wsd":
            progress = _ramp(step, steps - config.decay_fraction * steps, steps)
            return config.lr * (1 - (1 - config.final_lr) * progress)


def _ramp(step: int, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, linear between."""
    return min(1.0, max(0.0, (step - start) / max(end - start, 1)))
