"""The operations of `sdd.kernels`, and the choice of the implementation that runs them.

    composed    `sdd.functional` under autograd: the reference
    recompute   PyTorch operations with the backward pass written out (`sdd.kernels.recompute`)
    triton      the fused kernels (`sdd.kernels.fused`)

On "auto", the default, a large CUDA tensor of float32, bfloat16 or float16 runs on the kernels where Triton is
installed, and every other large tensor recomputes in training. Small tensors, no_grad, torch.compile without CUDA
(inductor fuses by itself) and `torch.func` (which transforms any PyTorch code) are composed. The environment variable
SDD_KERNELS and the context manager `use` force one path.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from inspect import Parameter, signature
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from sdd import functional as sdd_F
from sdd.errors import UserError
from sdd.kernels import experts, recompute

P = ParamSpec("P")
R = TypeVar("R")
Path = Literal["auto", "composed", "recompute", "triton"]

#: Whether Triton is installed.
HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below these sizes Python takes most of the time, and composed operations need less of it. CPU: measured, recomputation
# is 1.2 times slower at 64x256 and 1.3 times faster at 256x256. CUDA: estimated from host time alone (a forward and
# backward pass of a custom operation takes 0.25 ms more than a composed one); `sdd bench kernels --small` measures it.
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
        UserError: if there is no such path. An operation under "triton" raises it where the kernels cannot run.
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


def may_run() -> bool:
    """Whether fused kernels may run on a CUDA device now: no other path is forced, and `torch.func` is not at work.

    Raises:
        UserError: if SDD_KERNELS names no path.
    """
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return HAS_TRITON and not transformed and _checked(_forced) in ("auto", "triton")


def dispatched(reference: Callable[P, R]) -> Callable[P, R]:
    """`reference`, with its signature and documentation, run by the path that suits its first argument.

    The other implementations have the name of the reference: in `sdd.kernels.fused.operations`, and in
    `sdd.kernels.recompute` unless the reference itself is as good there. They take the arguments of the reference,
    and all its defaults, so that these are stated once.
    """
    name = reference.__name__
    parameters = signature(reference).parameters
    first = next(iter(parameters))
    defaults = {key: one.default for key, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    defaults = {key: default for key, default in defaults.items() if default is not Parameter.empty}

    @wraps(reference)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        path = path_of(cast(Tensor, args[0] if args else kwargs[first]))
        if path == "composed":
            return reference(*args, **kwargs)
        return _implementation(path, name, reference)(*args, **{**defaults, **kwargs})

    operation.__module__ = "sdd.kernels"
    return operation


scaled_norm = dispatched(sdd_F.scaled_norm)
swiglu = dispatched(sdd_F.swiglu)
sdd_swiglu = dispatched(sdd_F.sdd_swiglu)
sdd_swiglu_bare_up = dispatched(sdd_F.sdd_swiglu_bare_up)
expert_scaled_norm = dispatched(experts.expert_scaled_norm)
expert_swiglu = dispatched(experts.expert_swiglu)
expert_swiglu_bare_up = dispatched(experts.expert_swiglu_bare_up)
residual_norm = dispatched(sdd_F.residual_norm)
residual_postnorm = dispatched(sdd_F.residual_postnorm)
residual_prenorm = dispatched(sdd_F.residual_prenorm)
qk_norm_rope = dispatched(sdd_F.qk_norm_rope)


def _implementation(path: Path, name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    if path == "recompute":
        return getattr(recompute, name, reference)
    from sdd.kernels.fused import operations

    return getattr(operations, name)


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
    raise UserError(
        f"{path!r} (from SDD_KERNELS or sdd.kernels.use) is not a path of the kernels: choose one of "
        f"{', '.join(get_args(Path))}"
    )


def _check_triton(z: Tensor) -> None:
    if not HAS_TRITON:
        raise UserError("the kernels are forced (SDD_KERNELS or sdd.kernels.use), but Triton is not installed")
    if z.dtype not in _DTYPES:
        raise UserError(f"the kernels are forced on a tensor of {z.dtype}: they take float32, bfloat16 and float16")
    from sdd.kernels.fused.common import INTERPRETED

    # a tensor without data (`sdd plan`, torch.compile) runs no kernel, only its fake implementation
    if not (z.is_cuda or INTERPRETED or z.is_meta or isinstance(z, FakeTensor)):
        raise UserError(
            f"the kernels are forced on a {z.device.type} tensor: they need a CUDA device, or Triton's interpreter "
            "(TRITON_INTERPRET=1 before the start)"
        )
