"""Where a run computes, and in what precision."""

import torch

from sdd.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device that a config's `device` names; "auto" is the first that exists of cuda, mps (untested) and cpu.

    Raises:
        UserError: if it does not exist here.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present[name]:
        there = ", ".join(kind for kind, found in present.items() if found)
        raise UserError(f"device={name!r} is not available here: choose from {there}, or auto")
    return torch.device(name)


def pick_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32.

    Raises:
        UserError: if bfloat16 was asked for on a GPU that has none.
    """
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if precision == "bfloat16" and not has_bfloat16:
        raise UserError("precision=bfloat16: this GPU has no bfloat16; choose float32")
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16 else None
    return torch.bfloat16 if precision == "bfloat16" else None
