"""The fused operations as functions of plain tensors, with the bytes that each must move, and their rivals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sdd import functional as sdd_F
from sdd import kernels

#: Width of a head.
HEAD_DIM = 64


@dataclass
class Operation:
    """A function of activations and alphas.

    Attributes:
        function: takes n_activations tensors `[1, rows, width]`, then n_alphas tensors `[width]`.
        n_activations: number of activations.
        n_alphas: number of alphas.
        forward: number of activations that its forward pass must read or write.
        backward: the same for its backward pass, gradients included.
        options: its other arguments.
    """

    function: Callable[..., Any]
    n_activations: int
    n_alphas: int
    forward: int
    backward: int
    options: dict[str, Any] = field(default_factory=dict)


#: Names of the operations.
OPERATIONS = (
    "norm",
    "norm-by-head",
    "swiglu",
    "sdd-swiglu",
    "sdd-swiglu-joint",
    "residual",
    "residual-post-norm",
    "post-norm",
    "residual-pre-norm",
    "qk-norm-rope",
)


def operation(name: str, rows: int, width: int, device: torch.device) -> Operation:
    """The operation of that name in `OPERATIONS`; operations on heads need a width that is a multiple of `HEAD_DIM`."""

    def post_norm(z: Tensor, residual: Tensor, post_alpha: Tensor) -> Tensor:
        return kernels.residual_norm(z, residual, None, post_alpha)

    match name:
        case "norm":
            return Operation(kernels.scaled_norm, 1, 1, 2, 3)
        case "norm-by-head":
            return Operation(kernels.scaled_norm, 1, 1, 2, 3, {"group": HEAD_DIM})
        case "swiglu":
            return Operation(kernels.swiglu, 2, 0, 3, 5)
        case "sdd-swiglu":
            return Operation(kernels.sdd_swiglu, 2, 2, 3, 5)
        case "sdd-swiglu-joint":
            return Operation(kernels.sdd_swiglu, 2, 2, 3, 5, {"joint": True})
        case "residual":
            return Operation(kernels.residual_norm, 2, 1, 3, 3)
        case "residual-post-norm":
            return Operation(kernels.residual_norm, 2, 2, 3, 5)
        case "post-norm":
            return Operation(post_norm, 2, 1, 3, 5)
        case "residual-pre-norm":
            return Operation(kernels.residual_prenorm, 2, 2, 4, 6)
        case "qk-norm-rope":
            return Operation(_qk_norm_rope(rows, width, device), 1, 1, 2, 3)
    raise KeyError(name)


def _qk_norm_rope(rows: int, width: int, device: torch.device) -> Callable[..., Any]:
    cos, sin = sdd_F.rope_tables(rows, HEAD_DIM, device=device)

    def function(z: Tensor, alpha: Tensor) -> Tensor:
        return kernels.qk_norm_rope(z, alpha[:HEAD_DIM], cos, sin, n_heads=width // HEAD_DIM, group=HEAD_DIM)

    return function


def variants(name: str, op: Operation, device: torch.device, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Functions of the operation's tensors by name: our fast path here, composed, compiled, Liger where installed."""

    def on(path: kernels.Path, function: Callable[..., Any], *tensors: Tensor) -> Any:
        with kernels.use(path):
            return function(*tensors, **op.options)

    fast: kernels.Path = "triton" if device.type == "cuda" else "recompute"
    found: dict[str, Callable[..., Any]] = {path: partial(on, path, op.function) for path in (fast, "composed")}
    if compiled:
        found["compiled composed"] = partial(on, "composed", torch.compile(op.function, dynamic=False))
    if device.type == "cuda" and find_spec("liger_kernel"):
        found |= _liger(name)
    return found


def _liger(name: str) -> dict[str, Callable[..., Any]]:
    """Liger's version of the same function, if it has one."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    if name == "norm":
        return {"liger": lambda z, alpha: LigerRMSNormFunction.apply(z, alpha, 1e-6)}
    return {"liger": LigerSiLUMulFunction.apply} if name == "swiglu" else {}


def inputs_of(op: Operation, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random activations and alphas that require gradients; the same numbers in every call."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, rows, width)
    activations = [torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(op.n_activations)]
    alphas = torch.rand(op.n_alphas, width, device=device, generator=generator)
    return [x.requires_grad_() for x in [*activations, *alphas]]
