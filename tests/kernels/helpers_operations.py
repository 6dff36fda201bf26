"""Every operation of `sdd.kernels` with arguments, to go through them all."""

from collections.abc import Callable
from typing import Any

import torch
from helpers_kernels import DEVICE, drawn
from torch import Tensor

from sdd import functional as sdd_F
from sdd.kernels.experts import Order, sort_by_expert


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


def order_of(rows: list[int]) -> Order:
    """The order of that many rows of each expert."""
    experts = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    return sort_by_expert(experts.unsqueeze(1).to(DEVICE), len(rows))


def every_call(width: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """The function and arguments of every operation, for two rows: of a block, or of experts of which one has none.

    SwiGLU is there with every kind of gate and up projection.
    """
    found = {name: arguments_of(name, width, lambda i: drawn(i, 2, width)) for name in OPERATIONS}
    shared = {"z_gate": drawn(0, 2, width), "z_up": drawn(1, 2, width)}
    order = order_of([1, 0, 1])
    for name, shape, others in (("sdd_swiglu", (width,), {}), ("expert_swiglu", (3, width), {"order": order})):
        gate, up = {"alpha_gate": drawn(2, *shape)}, {"alpha_up": drawn(3, *shape)}
        no_gate, no_up = {"alpha_gate": None}, {"alpha_up": None}
        for label, alphas in {
            "both": gate | up,
            "gate": gate | no_up,
            "up": no_gate | up,
            "none": no_gate | no_up,
        }.items():
            found[f"{name}, {label}"] = name, shared | alphas | others
        found[f"{name}, joint"] = name, shared | gate | up | others | {"joint": True}
        for label, alphas in {"bare up": no_gate | up, "gate, bare up": gate | up}.items():
            found[f"{name}, {label}"] = f"{name}_bare_up", shared | alphas | others
    expert = {"z": drawn(0, 2, width), "alpha": drawn(1, 3, width), "order": order}
    weights, eps = {"weights": drawn(2, 2)}, {"eps": drawn(3, 2).square()}
    for label, more in {"": {}, ", weights": weights, ", eps": eps, ", weights, eps": weights | eps}.items():
        found[f"expert_scaled_norm{label}"] = "expert_scaled_norm", expert | more
    return found


def outputs_of(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y
