"""Which implementation runs an operation.

    composed    `sdd.functional` under autograd: the reference
    recompute   PyTorch operations with the backward pass written out (`sdd.kernels.recompute`)
    triton      the fused kernels (`sdd.kernels.fused`)

By itself ("auto"), a large CUDA tensor of float32, bfloat16 or float16 runs on the kernels where Triton is installed,
and every other large tensor recomputes in training. Small tensors, no_grad, torch.compile without CUDA (inductor fuses
by itself) and `torch.func` (which transforms any PyTorch code) are composed. The environment variable SDD_KERNELS and
the context manager `use` force one path.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sdd import functional as sdd_F
from sdd.errors import UserError
from sdd.functional import Eps, Group
from sdd.kernels import experts as grouped
from sdd.kernels import recompute
from sdd.kernels.experts import Order

Path = Literal["auto", "composed", "recompute", "triton"]

#: Whether Triton is installed.
HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below these sizes the time is that of Python, which composed operations take less of. CPU: measured, 64x256 is 1.2
# times slower and 256x256 1.3 times faster. CUDA: estimated from host time alone (a forward and backward pass of a
# custom operation takes 0.25 ms more of it than the composed one); `sdd bench kernels --small` measures it.
_SMALL = {"cpu": 32_768, "cuda": 1_048_576}
# a global, not a context variable: checkpointed blocks run again in autograd's own threads
_forced = os.environ.get("SDD_KERNELS", "auto")


@contextmanager
def use(path: Path) -> Iterator[None]:
    """Run all operations by one path inside the block, in every thread.

    A forward pass under activation checkpointing is repeated in the backward pass: keep both in the block.

    Args:
        path: "composed", "recompute" or "triton"; "auto" chooses for each tensor.

    Raises:
        UserError: if there is no such path. (An operation under "triton" raises it where the kernels cannot run.)
    """
    global _forced
    before, _forced = _forced, _checked(path)
    try:
        yield
    finally:
        _forced = before


def path_of(z: Tensor) -> Path:
    """The path by which an operation on z runs now.

    Raises:
        UserError: if "triton" is forced and cannot run, or SDD_KERNELS names no path.
    """
    path = _checked(_forced)
    if path == "auto":
        return _automatic(z)
    if path == "triton":
        _check_triton(z)
    return path


def scaled_norm(
    z: Tensor,
    alpha: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group = None,
    eps: Eps = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`alpha * norm(z) + b`; with one group, also RMSNorm. See `sdd.functional.scaled_norm`."""
    return _chosen(z).scaled_norm(z, alpha, bias, group=group, eps=eps, dtype=dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`. See `sdd.functional.swiglu`."""
    return _chosen(gate).sdd_swiglu(gate, up, None, None)


def sdd_swiglu(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    *,
    joint: bool = False,
    eps: float = 1e-6,
    up_eps: float | None = None,
) -> Tensor:
    """`silu(alpha_g * norm(z_g)) * (alpha_u * norm(z_u))`; no norm where alpha is None.

    See `sdd.functional.sdd_swiglu`.
    """
    return _chosen(z_gate).sdd_swiglu(z_gate, z_up, alpha_gate, alpha_up, joint=joint, eps=eps, up_eps=up_eps)


def sdd_swiglu_bare_up(
    z_gate: Tensor, z_up: Tensor, alpha_gate: Tensor | None, alpha_up: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`silu(alpha_g * norm(z_g)) * (alpha_u * z_u)`, and mean(z_u^2). See `sdd.functional.sdd_swiglu_bare_up`."""
    return _chosen(z_gate).sdd_swiglu_bare_up(z_gate, z_up, alpha_gate, alpha_up, eps=eps)


def expert_swiglu(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    order: Order,
    *,
    joint: bool = False,
    eps: float = 1e-6,
    up_eps: float | None = None,
) -> Tensor:
    """`sdd_swiglu` of rows sorted by expert, with their expert's alphas. See `sdd.kernels.experts.expert_swiglu`."""
    run = _chosen(z_gate, grouped).expert_swiglu
    return run(z_gate, z_up, alpha_gate, alpha_up, order, joint=joint, eps=eps, up_eps=up_eps)


def expert_swiglu_bare_up(
    z_gate: Tensor, z_up: Tensor, alpha_gate: Tensor | None, alpha_up: Tensor, order: Order, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`sdd_swiglu_bare_up` of rows sorted by expert. See `sdd.kernels.experts.expert_swiglu_bare_up`."""
    return _chosen(z_gate, grouped).expert_swiglu_bare_up(z_gate, z_up, alpha_gate, alpha_up, order, eps=eps)


def residual_norm(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    post_alpha: Tensor | None = None,
    *,
    residual_scale: float = 1.0,
    eps: Eps = 1e-6,
    post_eps: float = 1e-6,
    kept: Tensor | None = None,
) -> Tensor:
    """`s = c*residual + alpha * norm(z)`, or `post_alpha * norm(s)`. See `sdd.functional.residual_norm`."""
    return _chosen(z).residual_norm(
        z, residual, alpha, post_alpha, residual_scale=residual_scale, eps=eps, post_eps=post_eps, kept=kept
    )


def residual_postnorm(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    post_alpha: Tensor,
    *,
    residual_scale: float = 1.0,
    eps: Eps = 1e-6,
    post_eps: float = 1e-6,
    kept: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`y = post_alpha * norm(s)` and its copy in `dtype`. See `sdd.functional.residual_postnorm`."""
    return _chosen(z).residual_postnorm(
        z,
        residual,
        alpha,
        post_alpha,
        residual_scale=residual_scale,
        eps=eps,
        post_eps=post_eps,
        kept=kept,
        dtype=dtype,
    )


def residual_prenorm(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    norm_alpha: Tensor,
    *,
    residual_scale: float = 1.0,
    eps: Eps = 1e-6,
    norm_eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`s = c*residual + alpha * norm(z)` and `norm_alpha * norm(s)`. See `sdd.functional.residual_prenorm`."""
    return _chosen(z).residual_prenorm(
        z, residual, alpha, norm_alpha, residual_scale=residual_scale, eps=eps, norm_eps=norm_eps, dtype=dtype
    )


def qk_norm_rope(
    z: Tensor,
    alpha: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    group: int | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`rope(alpha * norm(z))`, or without alpha `rope(z)`. See `sdd.functional.qk_norm_rope`."""
    return _chosen(z).qk_norm_rope(z, alpha, cos, sin, n_heads=n_heads, group=group, eps=eps)


def _chosen(z: Tensor, without_kernels: ModuleType | None = None) -> ModuleType:
    """The module whose functions run an operation on z; the one given where the kernels do not."""
    match path_of(z):
        case "triton":
            from sdd.kernels.fused import operations

            return operations
        case "recompute":
            return without_kernels or recompute
    return without_kernels or sdd_F


def _automatic(z: Tensor) -> Path:
    compiling = torch.compiler.is_compiling()
    if not compiling and (
        z.numel() < _SMALL.get(z.device.type, 0) or torch._C._are_functorch_transforms_active()  # torch.func
    ):
        return "composed"
    if HAS_TRITON and z.is_cuda and z.dtype in _DTYPES:
        return "triton"
    return "composed" if compiling or not torch.is_grad_enabled() else "recompute"


def _checked(path: str) -> Path:
    for known in get_args(Path):
        if path == known:
            return known
    raise UserError(f"SDD_KERNELS={path!r} is no path of the kernels: choose one of {', '.join(get_args(Path))}")


def _check_triton(z: Tensor) -> None:
    if not HAS_TRITON:
        raise UserError("the kernels are forced (SDD_KERNELS or sdd.kernels.use), but Triton is not installed")
    if z.dtype not in _DTYPES:
        raise UserError(f"the kernels are forced on a tensor of {z.dtype}: they take float32, bfloat16 and float16")
    from sdd.kernels.fused.common import INTERPRETED

    if not (z.is_cuda or INTERPRETED or z.is_meta or isinstance(z, FakeTensor)):
        raise UserError(
            f"the kernels are forced on a {z.device.type} tensor: they need a CUDA device, or Triton's interpreter "
            "(TRITON_INTERPRET=1 before the start)"
        )
