"""Shared by the fused operations: their registration, rows, parts and launch shapes."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from sdd.functional import Eps
from sdd.norm_groups import alpha_size

#: Whether kernels run on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported).
INTERPRETED = bool(knobs.runtime.interpret)
#: The most features that one program holds at once. Wider rows are read twice.
MAX_BLOCK = 16_384
#: Features in a block of columns of such a wider row, or in a block of several heads.
WIDE_BLOCK = 4096
#: Features in a block of columns of an operation on two tensors.
COLUMN_BLOCK = 2048
#: `triton.jit`, whose declared type lacks the launch options.
jit: Any = triton.jit


def launched_as(name: str, empty: Callable[..., tuple[Tensor, ...]]) -> Callable[[Callable[..., None]], Any]:
    """Register the decorated function, which launches kernels, as the operation `torch.ops.sdd.NAME`.

    The function is called with the outputs, into which it writes, and the operation's arguments.

    Args:
        name: the operation's name.
        empty: has the operation's signature and allocates its outputs. It is the fake implementation too, which
            torch.compile and tensors without data run.
    """

    def register(launch: Callable[..., None]) -> Any:
        @wraps(empty)
        def run(*arguments: Any) -> tuple[Tensor, ...]:
            outputs, first = empty(*arguments), arguments[0]
            if first.numel():
                with on_device(first):
                    launch(outputs, *arguments)
            else:
                for output in outputs:  # sums over no rows
                    output.zero_()
            return outputs

        operation = torch.library.custom_op(f"sdd::{name}", run, mutates_args=())
        operation.register_fake(empty)
        return operation

    return register


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
    """The elements of x as a vector, adjacent in memory."""
    return None if x is None else x.reshape(-1).contiguous()


def cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of its parameter; None if either is missing."""
    return None if gradient is None or like is None else gradient.to(like.dtype)


def row_blocks(width: int, reduces: bool, most: int) -> tuple[int, int]:
    """Features of a block and blocks of a row: one block if the row `reduces` to a sum and is at most `most` wide."""
    whole = next_power_of_2(width)
    block = whole if reduces and whole <= most else min(whole, COLUMN_BLOCK)
    return block, cdiv(width, block)


def warps(block: int, numbers_a_thread: int) -> int:
    """Warps of a program whose threads hold about `numbers_a_thread` numbers of each tensor."""
    return max(1, min(16 if torch.version.hip else 32, block // (32 * numbers_a_thread)))


def n_programs(x: Tensor, n_rows: int, block: int, n_blocks: int = 1) -> int:
    """Programs of a backward kernel for each of `n_blocks` blocks of columns; each writes one partial sum of dalpha.

    Together they hold about 8192 features on each multiprocessor: enough to keep its memory pipe full, and few enough
    to bound the partial sums.
    """
    an_sm = min(16, 8192 // block)
    return min(n_rows, max(1, _n_multiprocessors(x.device) * max(1, an_sm) // n_blocks))


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of x the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def row_eps_of(eps: Eps, z: Tensor) -> tuple[Tensor | None, float]:
    """Split eps into a float32 tensor with one value for each row, `[...]` or None, and a number."""
    if isinstance(eps, Tensor):
        return eps.float().expand(z.shape[:-1]), 0.0
    return None, eps


@dataclass(frozen=True)
class NormPart:
    """The place of a part: its columns of z, its elements of alpha, its columns of r, the width of its groups."""

    columns: slice
    alphas: slice
    groups: slice
    group: int


def pairs(flat: list[int]) -> list[tuple[int, int]]:
    """The parts in `[width, group, width, group, ...]`, the form that an operation takes."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def parts_of(flat: list[int], alpha: Tensor) -> Iterator[NormPart]:
    """Yield the place of each part."""
    parts = pairs(flat)
    shared = alpha.shape[0] != alpha_size(parts, shared=False)
    column = first_alpha = first_group = 0
    for width, group in parts:
        columns = slice(column, column := column + width)
        alphas = slice(first_alpha, first_alpha := first_alpha + alpha_size(((width, group),), shared))
        groups = slice(first_group, first_group := first_group + (width // group if group else 0))
        yield NormPart(columns, alphas, groups, group)


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
    """Raise on create_graph=True: the kernel's backward has no derivative."""
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
