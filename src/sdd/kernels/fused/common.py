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
#: The widest row that a backward kernel holds in registers. Of a wider one it reads blocks of `LOOP_BLOCK` features,
#: twice, and holds no more than `MAX_SUMS` blocks of partial sums.
HELD_BLOCK, LOOP_BLOCK, MAX_SUMS = 4096, 2048, 14
#: Registers of a multiprocessor, the same on NVIDIA's since compute capability 5.0.
REGISTERS = 65_536
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


@dataclass(frozen=True)
class Shape:
    """What a program of a backward kernel holds.

    Attributes:
        block: features that it works on at once.
        blocks: blocks of a row. Several are read twice, the second time from a cache.
        warps: of the program.
        registers: of a thread, at most. `./dev kernels` fails if a kernel does not fit into them.
    """

    block: int
    blocks: int
    warps: int
    registers: int

    @property
    def options(self) -> dict[str, int]:
        """The launch options."""
        return {"BLOCK": self.block, "BLOCKS": self.blocks} | self.resources

    @property
    def resources(self) -> dict[str, int]:
        """The launch options without blocks. The compiler for AMD takes no limit of registers."""
        return {"num_warps": self.warps} | ({} if torch.version.hip else {"maxnreg": self.registers})


def fits(width: int, sums: int) -> bool:
    """Whether one program holds `sums` partial sums of a row of `width` features."""
    return cdiv(width, LOOP_BLOCK) * sums <= MAX_SUMS


def row_shape(width: int, sums: int) -> Shape:
    """Of a program that has a whole row at a time and holds `sums` partial sums of its width.

    Up to four features a thread, with all that is computed from them, fit into 64 registers, and so do 16 sums a thread
    with what a block of a longer row needs. More take 128.
    """
    whole = next_power_of_2(width)
    if whole <= HELD_BLOCK:
        return Shape(whole, 1, warps(whole, 4), 64)
    blocks = cdiv(width, LOOP_BLOCK)
    return Shape(LOOP_BLOCK, blocks, warps(LOOP_BLOCK, 4), 64 if sums * blocks <= 4 else 128)


def n_programs(x: Tensor, n_rows: int, shape: Shape, n_blocks: int = 1) -> int:
    """Programs of a backward kernel for each of `n_blocks` blocks of columns; each writes one partial sum of dalpha.

    As many as the multiprocessors hold at once: more would wait for the first to end, and each adds to the sums.
    """
    an_sm = programs_an_sm(shape.warps, shape.registers)
    return min(n_rows, max(1, _n_multiprocessors(x.device) * an_sm // n_blocks))


def programs_an_sm(n_warps: int, registers: int) -> int:
    """Programs that a multiprocessor holds by their registers, 16 at most. `./dev kernels` fails if fewer fit."""
    return max(1, min(16, REGISTERS // (32 * n_warps * registers)))


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
def zeros(SHAPE: tl.constexpr, BLOCKS: tl.constexpr):
    """The partial sums of BLOCKS blocks."""
    sums = ()
    for _ in tl.static_range(BLOCKS):  # pyright: ignore[reportGeneralTypeIssues]
        sums = sums + (tl.zeros(SHAPE, tl.float32),)  # noqa: RUF005 - the compiler takes no starred tuple
    return sums


@jit
def add_to_first(sums, x):
    """Add x to the first block of sums and make it the last. After all blocks their order is the first one again.

    So a loop over blocks finds its sum without an index, which registers do not have, and need not be unrolled, which
    would let the compiler load several blocks at once and run out of registers.
    """
    return sums[1:] + (sums[0] + x,)  # noqa: RUF005


@jit
def block_count(WIDTH, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS, as a number that the compiler knows only if it is 1: then both reads of a row become one."""
    return tl.cdiv(WIDTH, BLOCK) if BLOCKS > 1 else 1


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
