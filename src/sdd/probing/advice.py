"""What to try against each kind of alarm, in words that fit the run."""

import math
from collections.abc import Mapping
from typing import Any

from sdd.probing.checks import Kind

Settings = Mapping[str, Any]


def advice(kind: Kind, where: str, settings: Settings) -> str:
    """What to try.

    Args:
        kind: of the alarm.
        where: its site.
        settings: config.json with dotted names; may be empty.
    """
    match kind:
        case "fading gradients":
            return _joined(_lower_lr(settings), _warm_up(settings), _placement(settings))
        case "exploding gradients":
            return _joined(_lower_lr(settings), _warm_up(settings), _placement(settings), "a smaller model.init_scale")
        case "attention logits":
            return _joined(_qk_norm(settings), _lower_lr(settings))
        case "dead alpha":
            decayed = settings.get("optim.alpha_weight_decay")
            return _joined("optim.alpha_weight_decay 0" if decayed else "", _lower_lr(settings))
        case "eps":
            return _joined(_larger_init(settings), f"a smaller eps of the norm at {where or 'that site'}")
        case "large updates":
            return _joined(_warm_up(settings), _lower_lr(settings), _larger_init(settings))
        case "stuck weights":
            return "a smaller optim.eps, if gradients fade above it; nothing, if it is meant to be frozen"
        case "dead experts":
            return _joined(_larger(settings, "model.moe.balance_loss"), _lower_lr(settings), _warm_up(settings))
        case "saturated router":
            return _joined(_larger(settings, "model.moe.router_z_loss"), _lower_lr(settings))
        case "rising loss":
            return _joined(_lower_lr(settings), _warm_up(settings), "go on from a checkpoint before the rise")
        case "loss spike" | "gradient spike":
            return _joined("guard.spikes skip", _lower_lr(settings), "look at the batch of that step")
        case "non-finite":
            return _joined("go on from the last checkpoint with a lower optim.lr", "precision float32 to tell overflow")
        case "damaged weights":
            return "check the machine's memory; sdd resume goes on from the last whole checkpoint"


def _lower_lr(settings: Settings) -> str:
    lr = _number(settings, "optim.lr")
    return f"lower optim.lr from {lr:g} to {_one_digit(lr / 3):g}" if lr else "lower the learning rate to a third"


def _warm_up(settings: Settings) -> str:
    warmup, steps = _number(settings, "optim.warmup"), _number(settings, "steps")
    if warmup is None:
        return "warm up longer"
    more = max(3 * warmup, 0.05 * (steps or 0), 40)
    return f"warm up over {_one_digit(more):,.0f} steps (optim.warmup is {warmup:,.0f})"


def _placement(settings: Settings) -> str:
    norms = _norms(settings)
    if "attn_post" in norms and "attn_out" not in norms:
        return "SDD at the projections that write to the stream (--placement sdd), or Pre-Norm (prenorm-qk)"
    return "" if norms else "a norm on the output projections (SDD), or Pre-Norm wiring"


def _qk_norm(settings: Settings) -> str:
    norms = _norms(settings)
    return "" if {"q", "k"} <= norms.keys() else "norm q and k (placements sdd and prenorm-qk do)"


def _larger_init(settings: Settings) -> str:
    scale = _number(settings, "model.init_scale")
    return "a larger init" if scale is None else f"a larger init (model.init_scale is {scale:g})"


def _larger(settings: Settings, name: str) -> str:
    value = _number(settings, name)
    return f"a larger {name}" if value is None else f"a larger {name} (it is {value:g})"


def _norms(settings: Settings) -> Mapping[str, Any]:
    placement = settings.get("model.placement")
    norms = placement.get("norms") if isinstance(placement, Mapping) else None
    return norms if isinstance(norms, Mapping) else {}


def _number(settings: Settings, name: str) -> float | None:
    value = settings.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _one_digit(value: float) -> float:
    return float(f"{value:.1g}")


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
