"""Every operation of `sdd.kernels` with arguments, to go through them all."""

from collections.abc import Callable
from typing import Any

import torch
from helpers_kernels import DEVICE, drawn
from torch import Tensor

from sdd import functional as sdd_F


def tables(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    return sdd_F.rope_tables(length, head_dim, 20.0, DEVICE)


def operations(width: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every operation with the arguments beside its activations, for two rows of that width (a multiple of 4)."""
    alpha, other = drawn(1, width), drawn(2, width)
    cos, sin = tables(2, width // 2)
    eps = drawn(3, 2).square()
    return {
        "scaled_norm": ("scaled_norm", {"alpha": alpha, "bias": other, "eps": eps}),
        "two groups": ("scaled_norm", {"alpha": alpha[: width // 2], "group": width // 2, "eps": eps}),
        "narrow norm": ("scaled_norm", {"alpha": alpha, "eps": eps, "dtype": torch.bfloat16}),
        "swiglu": ("swiglu", {}),
        "sdd_swiglu": ("sdd_swiglu", {"alpha_gate": alpha, "alpha_up": other, "up_eps": 1e-2}),
        "joint": ("sdd_swiglu", {"alpha_gate": alpha, "alpha_up": other, "joint": True}),
        "bare up": ("sdd_swiglu_bare_up", {"alpha_gate": alpha, "alpha_up": other}),
        "residual": ("residual_norm", {"alpha": alpha, "residual_scale": 1.5, "eps": eps}),
        "post-norm": ("residual_norm", {"alpha": alpha, "post_alpha": other, "eps": eps}),
        "plain post-norm": ("residual_norm", {"alpha": None, "post_alpha": other}),
        "post-norm, copy": ("residual_postnorm", {"alpha": alpha, "post_alpha": other, "dtype": torch.bfloat16}),
        "pre-norm": ("residual_prenorm", {"alpha": alpha, "norm_alpha": other, "eps": eps}),
        "narrow pre-norm": ("residual_prenorm", {"alpha": alpha, "norm_alpha": other, "dtype": torch.bfloat16}),
        "plain pre-norm": ("residual_prenorm", {"alpha": None, "norm_alpha": other}),
        "qk": ("qk_norm_rope", {"alpha": alpha, "cos": cos, "sin": sin, "n_heads": 2}),
        "qk by head": ("qk_norm_rope", {"alpha": alpha, "cos": cos, "sin": sin, "n_heads": 2, "group": width // 2}),
        "rope": ("qk_norm_rope", {"alpha": None, "cos": cos, "sin": sin, "n_heads": 2}),
    }


OPERATIONS = list(operations(4))
ACTIVATIONS = {
    "scaled_norm": ("z",),
    "swiglu": ("gate", "up"),
    "sdd_swiglu": ("z_gate", "z_up"),
    "sdd_swiglu_bare_up": ("z_gate", "z_up"),
    "residual_norm": ("z", "residual"),
    "residual_postnorm": ("z", "residual"),
    "residual_prenorm": ("z", "residual"),
    "qk_norm_rope": ("z",),
}


def arguments_of(name: str, width: int, activation: Callable[[int], Tensor]) -> tuple[str, dict[str, Any]]:
    """The function of an operation, and all its arguments."""
    function, others = operations(width)[name]
    return function, {key: activation(i) for i, key in enumerate(ACTIVATIONS[function])} | others


def outputs_of(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y
