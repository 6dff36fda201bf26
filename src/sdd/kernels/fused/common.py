"""What the fused operations share: rows, parts and launch shapes."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from sdd.functional import Eps, Parts, alpha_size

#: Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 before its import), on CPU tensors.
INTERPRETED = bool(knobs.runtime.interpret)
#: The most features that one program holds at once; wider rows are read twice.
MAX_BLOCK = 16_384
#: Features in a block of columns of a row that is wider, or of several heads.
WIDE_BLOCK = 4096
#: Features in a block of columns of an operation on two tensors.
COLUMN_BLOCK = 2048
#: Compiles a kernel; its declared type knows no launch options.
jit: Any = triton.jit


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def rows(x: Tensor) -> Tensor:
    """`[..., N]` as `[rows, N]` with adjacent features: a view wherever strides allow one, else a copy."""
    width = x.shape[-1]
    x = x.reshape(math.prod(x.shape[:-1]), width)
    return x if x.stride(-1) == 1 or width == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """A vector with adjacent elements."""
    return None if x is None else x.contiguous()


def row_blocks(width: int, reduces: bool, most: int) -> tuple[int, int]:
    """Features of a block and blocks of a row: one where the row is summed over and at most `most` wide."""
    whole = next_power_of_2(width)
    block = whole if reduces and whole <= most else min(whole, COLUMN_BLOCK)
    return block, cdiv(width, block)


def warps(block: int, numbers_a_thread: int) -> int:
    """Warps of a program whose threads hold about that many numbers of each tensor."""
    return max(1, min(16 if torch.version.hip else 32, block // (32 * numbers_a_thread)))


def n_programs(x: Tensor, n_rows: int, block: int, n_blocks: int = 1) -> int:
    """Programs of a backward kernel for each of `n_blocks` blocks of columns: each writes one partial sum of dalpha.

    Together they hold about 8192 features on each multiprocessor, which keeps its memory pipe full and bounds the
    partial sums.
    """
    an_sm = min(16, 8192 // block)
    return min(n_rows, max(1, _n_multiprocessors(x.device) * max(1, an_sm) // n_blocks))


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def row_eps_of(eps: Eps, z: Tensor) -> tuple[Tensor | None, float]:
    """What an operation takes for eps: one a row `[...]` in float32 or None, and a number."""
    if isinstance(eps, Tensor):
        return eps.float().expand(z.shape[:-1]), 0.0
    return None, eps


@dataclass(frozen=True)
class Part:
    """Where a part stands: its columns of z, its elements of alpha, its columns of r, the width of its groups."""

    columns: slice
    alphas: slice
    groups: slice
    group: int


def pairs(flat: list[int]) -> Parts:
    """`[width, group, width, group, ...]`, as an operation takes it, as parts."""
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def parts_of(flat: list[int], alpha: Tensor) -> Iterator[Part]:
    """Where each part stands."""
    parts = pairs(flat)
    shared = alpha.shape[0] != alpha_size(parts, shared=False)
    column = first_alpha = first_group = 0
    for width, group in parts:
        columns = slice(column, column := column + width)
        alphas = slice(first_alpha, first_alpha := first_alpha + alpha_size(((width, group),), shared))
        groups = slice(first_group, first_group := first_group + (width // group if group else 0))
        yield Part(columns, alphas, groups, group)


@jit
def tile(BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BY_COLUMN: tl.constexpr):
    """This program's heads `[H, 1]` and columns `[1, D]`."""
    head = tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    if BY_COLUMN:
        head += tl.program_id(2)
        column += tl.program_id(1) * BLOCK_D
    else:
        head += tl.program_id(1) * BLOCK_H
    return head, column


@jit
def load_row(ptr, column, there):
    """A block of a row in float32."""
    return tl.load(ptr + column, mask=there, other=0).to(tl.float32)


@jit
def mean_square_kernel(z_ptr, mean_ptr, WIDTH, z_stride, mean_stride, BLOCK: tl.constexpr):
    """The mean of z^2 over one wide group."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z_ptr += row * z_stride + head * WIDTH
    total = tl.full((BLOCK,), 0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < WIDTH, other=0).to(tl.float32)
        total += z * z
    tl.store(mean_ptr + row * mean_stride + head, tl.sum(total) / WIDTH)


def forbid_double_backward(name: str) -> None:
    """Say it where a backward pass is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the kernel of {name} cannot be differentiated twice (create_graph=True): run forward and backward under "
            "sdd.kernels.use('composed')"
        )


@cache
def _n_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted: more than one, so that partial sums are tested
    return torch.cuda.get_device_properties(device).multi_processor_count
