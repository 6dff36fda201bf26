"""Whether bfloat16 would be faster on this CPU. Only a hint: a run stays in float32 until it is told otherwise."""

import time

import torch
import torch.nn.functional as F

from sdd.train.config import RunConfig

#: Many processors have the instructions, and are slower with them: what counts is the time.
_WORTH_A_LINE = 1.3
_ROWS, _TIMES = 512, 3


def hint(config: RunConfig, device: torch.device) -> str | None:
    """One line, if a run left its precision to a CPU that multiplies the run's matrices faster in bfloat16."""
    if device.type != "cpu" or config.precision != "auto":
        return None
    gain = _seconds(config, torch.float32) / _seconds(config, torch.bfloat16)
    if gain < _WORTH_A_LINE:
        return None
    return f"this CPU multiplies matrices {gain:.1f} times as fast in bfloat16: --precision bfloat16, if you want that"


def _seconds(config: RunConfig, dtype: torch.dtype) -> float:
    """The shortest of some products of rows with a feed-forward matrix."""
    x, weight = (torch.ones(n, config.model.d_model, dtype=dtype) for n in (_ROWS, config.model.d_ff))
    found: list[float] = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        F.linear(x, weight)
        found.append(time.perf_counter() - began)
    return min(found)
