"""Compile every kernel for a GPU that is not here: run by `test_kernels_build.py`, in a process without interpreter.

Operations are called on CPU tensors, and what they would launch is compiled to machine code instead. It finds what the
interpreter, which runs kernels as Python, lets pass. Prints one line a kernel: name, constants, registers if known.
"""

import inspect
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sdd import functional as sdd_F
from sdd import kernels
from sdd.kernels.experts import sort_by_expert
from sdd.kernels.fused import common

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def build(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, num_warps: int, **kwargs: Any) -> None:
    """Compile what a launch with these arguments would compile."""
    arguments = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, (name, value) in enumerate(arguments.items()):
        if isinstance(value, Tensor):
            signature[name], attributes[index,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif kernel.fn.__annotations__.get(name) is tl.constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": num_warps})
    assert compiled.asm["cubin"]
    print(kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__, constants)


def call(name: str, *tensors: Tensor | None, **kwargs: Any) -> None:
    """Forward and backward pass of an operation."""
    leaves = [x.requires_grad_() for x in tensors if x is not None and x is not COS and x is not SIN]
    y = getattr(kernels, name)(*tensors, **kwargs)
    y = (y,) if isinstance(y, Tensor) else y
    torch.autograd.grad(y, leaves, [torch.empty_like(part) for part in y])


def alpha(*shape: int) -> Tensor:
    return torch.empty(shape)


def z(width: int) -> Tensor:
    return torch.empty(4, width, dtype=torch.bfloat16)


COS, SIN = sdd_F.rope_tables(4, 64)
ORDER = sort_by_expert(torch.tensor([[0], [0], [2], [2]]), 3)

if __name__ == "__main__":
    JITFunction.run = build
    common.INTERPRETED = True  # lets CPU tensors pass
    with kernels.use("triton"):
        call("scaled_norm", z(2048), alpha(64), alpha(2048), group=64)
        call("scaled_norm", z(32768), alpha(32768), eps=torch.empty(4))
        call("scaled_norm", z(2048).float(), alpha(2048), dtype=torch.bfloat16)
        call("sdd_swiglu", z(2048), z(2048), alpha(2048), alpha(2048), joint=True)
        call("sdd_swiglu_bare_up", z(16384), z(16384), alpha(16384), alpha(16384))
        call("expert_swiglu", z(1024), z(1024), alpha(3, 1024), alpha(3, 1024), order=ORDER)
        call("expert_swiglu_bare_up", z(16384), z(16384), alpha(3, 16384), alpha(3, 16384), order=ORDER)
        call("residual_prenorm", z(2048), z(2048), alpha(2048), alpha(2048), eps=torch.empty(4))
        call("residual_prenorm", z(2048), z(2048).float(), None, alpha(2048), dtype=torch.bfloat16)
        copies = {"kept": z(2048), "dtype": torch.bfloat16}
        call("residual_postnorm", z(2048), z(2048).float(), alpha(2048), alpha(2048), **copies)
        call("residual_postnorm", z(2048), z(2048).float(), None, alpha(2048), **copies)
        call("qk_norm_rope", z(2048), alpha(2048), COS, SIN, n_heads=32)
        call("qk_norm_rope", z(2048), alpha(64), COS, SIN, n_heads=32, group=64)
    sys.exit(0)
