"""Advice: what to try against each kind of alarm, in words that fit the run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sdd.files import number
from sdd.probing.checks import Kind

Settings = Mapping[str, Any]


def advice(kind: Kind, settings: Settings) -> str:
    """Advice against an alarm, as one line.

    Args:
        kind: of the alarm.
        settings: config.json with dotted names; may be empty.
    """
    measures = (measure if isinstance(measure, str) else measure(settings) for measure in _MEASURES[kind])
    return "; ".join(measure for measure in measures if measure)


def _lower_lr(settings: Settings) -> str:
    lr = number(settings.get("optim.lr"))
    return f"lower optim.lr from {lr:g} to {_one_digit(lr / 3):g}" if lr > 0 else "lower the learning rate to a third"


def _warm_up(settings: Settings) -> str:
    warmup, steps = number(settings.get("optim.warmup")), number(settings.get("steps"))
    if not warmup >= 0:
        return "warm up longer"
    more = max(3 * warmup, 40, 0.05 * steps if steps > 0 else 0)
    return f"warm up over {_one_digit(more):,.0f} steps (optim.warmup is {warmup:,.0f})"


def _placement(settings: Settings) -> str:
    norms = _norms(settings)
    if "attn_post" in norms and "attn_out" not in norms:
        return "SDD at the projections that write to the stream (--placement sdd), or Pre-Norm (prenorm-qk)"
    return "" if norms else "a norm on the output projections (SDD), or Pre-Norm wiring"


def _qk_norm(settings: Settings) -> str:
    return "" if {"q", "k"} <= _norms(settings).keys() else "norm q and k (placements sdd and prenorm-qk do)"


def _no_alpha_decay(settings: Settings) -> str:
    return "optim.alpha_weight_decay 0" if settings.get("optim.alpha_weight_decay") else ""


def _larger(name: str, settings: Settings) -> str:
    value = number(settings.get(name))
    return f"a larger {name} (it is {value:g})" if value >= 0 else f"a larger {name}"


def _norms(settings: Settings) -> Mapping[str, Any]:
    placement = settings.get("model.placement")
    norms = placement.get("norms") if isinstance(placement, Mapping) else None
    return norms if isinstance(norms, Mapping) else {}


def _one_digit(value: float) -> float:
    return float(f"{value:.1g}")


_larger_init = partial(_larger, "model.init_scale")
#: A function returns "" if its measure does not fit the run.
_MEASURES: Mapping[Kind, Sequence[str | Callable[[Settings], str]]] = {
    "fading gradients": (_lower_lr, _warm_up, _placement),
    "exploding gradients": (_lower_lr, _warm_up, _placement, "a smaller model.init_scale"),
    "attention logits": (_qk_norm, _lower_lr),
    "dead alpha": (_no_alpha_decay, _lower_lr),
    "eps": (_larger_init, "a smaller eps of that norm"),
    "large updates": (_warm_up, _lower_lr, _larger_init),
    "stuck weights": ("a smaller optim.eps, if gradients fade above it", "nothing, if it is meant to be frozen"),
    "dead experts": (partial(_larger, "model.moe.balance_loss"), _lower_lr, _warm_up),
    "saturated router": (partial(_larger, "model.moe.router_z_loss"), _lower_lr),
    "rising loss": (_lower_lr, _warm_up, "go on from a checkpoint before the rise"),
    "loss spike": ("guard.spikes skip", _lower_lr, "look at the batch of that step"),
    "gradient spike": ("guard.spikes skip", _lower_lr, "look at the batch of that step"),
    "non-finite": ("go on from the last checkpoint with a lower optim.lr", "precision float32, to rule out overflow"),
    "damaged weights": ("check the machine's memory", "sdd resume goes on from the last whole checkpoint"),
}
