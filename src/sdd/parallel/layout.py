"""How the processes of a run share the work: the sizes of the dimensions of their mesh, and which sizes fit.

    replicate   copies of everything below (with `shard`: HSDP)
    shard       parts of parameters, gradients and optimiser state (FSDP2)
    context     parts of each sequence
    expert      parts of the experts of a mixture
    tensor      parts of each matrix, the neighbours among the processes

Processes that differ in replicate, shard or expert train on other rows of a batch: these are the data dimensions.
Processes that differ in context or tensor train on the same rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from sdd.errors import UserError
from sdd.models.config import ModelConfig

#: From the outermost dimension to the innermost.
DIMENSIONS = ("replicate", "shard", "context", "expert", "tensor")
#: The dimensions along which the rows of a batch differ.
DATA = ("replicate", "shard", "expert")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share the work; their number is the product of the sizes.

    Attributes:
        replicate: copies of the model, each shared by the processes of the other dimensions (HSDP).
        shard: processes that share parameters, gradients and optimiser state (FSDP2); 0 for what the others leave.
        tensor: processes that share each matrix of the blocks, and the tokens between the matrices.
        expert: processes that share the experts of a mixture, and send each other its tokens.
        context: processes that share each sequence, two pieces of it each.
        context_attention: how they attend to the tokens of each other: "gather" their keys and values, or "ring",
            torch's ring attention, which runs on CUDA in bfloat16, has no document mask, and is untested there.
        reshard: whether a block that `shard` cuts is given up after its forward pass and gathered again for the
            backward pass: "always", "never" (faster, and all blocks are in memory at once), or "auto", all but the last
            block, whose backward pass comes next. The numbers are the same.
    """

    replicate: int = 1
    shard: int = 0
    tensor: int = 1
    expert: int = 1
    context: int = 1
    context_attention: Literal["gather", "ring"] = "gather"
    reshard: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            least = 0 if name == "shard" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.context_attention not in ("gather", "ring"):
            raise ValueError(f"context_attention={self.context_attention!r}: choose gather or ring")
        if self.reshard not in ("auto", "always", "never"):
            raise ValueError(f"reshard={self.reshard!r}: choose auto, always or never")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension, from the outermost to the innermost."""
        return {name: getattr(self, name) for name in DIMENSIONS}

    @property
    def data(self) -> int:
        """The number of parts that the rows of a batch are cut into."""
        return math.prod(getattr(self, name) for name in DATA)

    @property
    def is_plain(self) -> bool:
        """Whether every process shards and nothing else."""
        return self.data == self.shard and self.context == self.tensor == 1

    @property
    def rings(self) -> bool:
        """Whether processes that share sequences attend by torch's ring."""
        return self.context > 1 and self.context_attention == "ring"

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {getattr(self, name)}" for name in DIMENSIONS if getattr(self, name) > 1)
        return (sizes or "shard 1") + (" by ring attention" if self.rings else "")

    def resolved(self, processes: int, model: ModelConfig) -> "ParallelConfig":
        """The same layout with `shard` as a number.

        Args:
            processes: their number.
            model: what they train.

        Raises:
            UserError: if the layout does not fit; the message names the nearest that does.
        """
        layout = self._filled(processes)
        problem = next(problems(layout, processes, model), None)
        if problem is None:
            return layout
        near = min(layouts(processes, model), key=self._distance)
        raise UserError(f"{problem}; the nearest layout of {_count(processes)} that fits: {near.words(self)}")

    def words(self, asked: "ParallelConfig") -> str:
        """The options that turn another layout into this one; `shard` only where that one gives its number."""
        theirs = asked.sizes
        named = {name: size for name, size in self.sizes.items() if theirs[name] and max(size, theirs[name]) > 1}
        return " ".join(f"--parallel.{name} {size}" for name, size in named.items())

    def _filled(self, processes: int) -> "ParallelConfig":
        others = math.prod(getattr(self, name) for name in DIMENSIONS if name != "shard")
        return self if self.shard else replace(self, shard=max(1, processes // others))

    def _distance(self, other: "ParallelConfig") -> float:
        """How far a layout is from the one asked for: the ratios of the sizes, those that were asked for first."""
        ours, theirs = self.sizes, other.sizes
        return sum(
            abs(math.log2(theirs[name] / ours[name])) * (1.0 if ours[name] > 1 else 1.5)
            for name in DIMENSIONS
            if ours[name]
        )


def problems(layout: ParallelConfig, processes: int, model: ModelConfig) -> Iterator[str]:
    """What is wrong with a layout, one line each.

    Args:
        layout: resolved.
        processes: their number.
        model: what they train.
    """
    sizes = layout.sizes
    if layout.expert > 1 and model.moe is None:
        yield f"parallel.expert={layout.expert} shares the experts of a mixture, and this model is dense"
    if math.prod(sizes.values()) != processes:
        yield f"parallel ({layout}) is for {_count(math.prod(sizes.values()))}, and this run has {processes}"
    divided = {
        "tensor": {
            "n_heads": model.n_heads,
            "n_kv_heads": model.n_kv_heads,
            **({"d_ff": model.d_ff} if model.moe is None else {"moe.d_shared": model.moe.d_shared}),
        },
    }
    for name, widths in divided.items():
        for width, value in widths.items():
            if value % sizes[name]:
                yield f"parallel.{name}={sizes[name]} does not divide model.{width}={value}"
    if model.moe is not None and model.moe.n_experts % (parts := layout.expert * layout.tensor):
        names = " * ".join(f"parallel.{name}" for name in ("expert", "tensor") if sizes[name] > 1)
        yield f"{names} = {parts} does not divide model.moe.n_experts={model.moe.n_experts}"
    if layout.context > 1 and model.context % (parts := 2 * layout.context):
        yield f"2 * parallel.context = {parts} does not divide model.context={model.context} tokens"
    if model.context % (parts := layout.context * layout.tensor):
        yield f"parallel.context * parallel.tensor = {parts} does not divide model.context={model.context} tokens"


def layouts(processes: int, model: ModelConfig) -> Iterator[ParallelConfig]:
    """All layouts of that many processes that fit a model; one of them only shards."""
    for sizes in _factorisations(processes, len(DIMENSIONS)):
        layout = ParallelConfig(**dict(zip(DIMENSIONS, sizes, strict=True)))
        if next(problems(layout, processes, model), None) is None:
            yield layout


def _count(processes: int) -> str:
    return f"{processes} process{'es' * (processes > 1)}"


def _factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All tuples of that many factors whose product is the number."""
    if parts == 1:
        yield (number,)
        return
    for first in divisors(number):
        yield from ((first, *rest) for rest in _factorisations(number // first, parts - 1))


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
