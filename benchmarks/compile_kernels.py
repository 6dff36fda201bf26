"""Registers, stack and resident warps of every fused kernel, compiled for sm_90 without a GPU: `./dev kernels`.

    ./dev kernels                      # a table, widths 2048 to 32768
    ./dev kernels --json               # the same as JSON
    ./dev kernels --widths 2048        # one width

Operations are called on CPU tensors, forward and backward, and what they would launch is compiled instead. Stack bytes
are registers that did not fit and spill to memory. The exit code is 1 if a kernel spills and `SPILLS` does not list it,
if the list names a kernel that no longer spills, or if an SM holds fewer programs than a launch counts on; 2 if the
check cannot run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler
if find_spec("triton") is None:
    print("compile_kernels: Triton is not installed, and without it there are no kernels to compile", file=sys.stderr)
    sys.exit(2)

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sdd import functional as sdd_F
from sdd import kernels
from sdd.kernels.experts import sort_by_expert
from sdd.kernels.fused import common
from sdd.terminal import aligned

#: The release whose private parts are used here, the one in constraints.txt.
TRITON = "3.7.1"
TARGET = GPUTarget("cuda", 90, 32)
#: 14,336 is the widest row of which a program holds two sums. The last one is wider than any program holds.
WIDTHS = (2048, 4096, 8192, 14_336, 16_384, 32_768)
#: Rows of an activation. A multiple of 16, which the compiler is told, as it is in training.
ROWS = 64
#: Of an H100: registers, shared memory, warps and programs of a multiprocessor; multiprocessors.
REGISTERS, SHARED, WARPS, PROGRAMS, MULTIPROCESSORS = 65_536, 233_472, 64, 32, 132


@dataclass(frozen=True)
class Spill:
    """Permission to spill.

    Attributes:
        kernel: `module.function`.
        width: the features of a row.
        most: bytes of stack a thread, at most.
        reason: why it is accepted.
    """

    kernel: str
    width: int
    most: int
    reason: str


#: Every kernel that may spill: none does.
SPILLS: tuple[Spill, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A kernel as the JIT would specialise it: arguments of `triton.compile`, and the call it comes from."""

    operation: str
    width: int
    kernel: JITFunction
    source: ASTSource = field(repr=False)
    options: Any

    @property
    def name(self) -> str:
        """`module.function`."""
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"


@dataclass(frozen=True)
class Usage:
    """The resources of a compiled kernel: registers and bytes of stack a thread, warps of a program and of an SM.

    `counted_on` are the warps of an SM for which the launch makes programs, 0 where it makes one for each row.
    """

    kernel: str
    operation: str
    width: int
    warps: int
    registers: int
    stack: int
    resident: int
    counted_on: int


def operations(width: int) -> Iterator[tuple[str, str, list[Tensor | None], dict[str, Any]]]:
    """Yield a label, the function's name in `sdd.kernels`, its tensors and its other arguments."""

    def z(dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(ROWS, width, dtype=dtype)

    def alpha(*shape: int) -> Tensor:
        return torch.empty(*shape or (width,))

    wide, narrow, eps = torch.float32, {"dtype": torch.bfloat16}, {"eps": torch.empty(ROWS)}
    yield "norm", "scaled_norm", [z(), alpha()], {}
    yield "norm, bias, eps of rows", "scaled_norm", [z(), alpha(), alpha()], eps
    yield "norm of heads", "scaled_norm", [z(), alpha()], {"group": 64}
    yield "norm of heads, one alpha", "scaled_norm", [z(), alpha(128)], {"group": 128}
    yield "norm, float32 to bfloat16", "scaled_norm", [z(wide), alpha()], narrow

    order = sort_by_expert(torch.arange(ROWS)[:, None] % 4, 4)
    yield "swiglu", "swiglu", [z(), z()], {}
    for experts, name in (((), "sdd_swiglu"), ((4, width), "expert_swiglu")):
        others: dict[str, Any] = {"order": order} if experts else {}
        label = name.replace("_", " ")
        yield f"{label}, gate", name, [z(), z(), alpha(*experts), None], others
        yield f"{label}, both", name, [z(), z(), alpha(*experts), alpha(*experts)], others
        yield f"{label}, joint", name, [z(), z(), alpha(*experts), alpha(*experts)], others | {"joint": True}
        for gate in (alpha(*experts), None):
            bare = "bare up" if gate is None else "gate, bare up"
            yield f"{label}, {bare}", f"{name}_bare_up", [z(), z(), gate, alpha(*experts)], others

    yield "expert norm", "expert_scaled_norm", [z(), alpha(4, width)], {"order": order}
    yield "expert norm, weights", "expert_scaled_norm", [z(), alpha(4, width)], {"order": order, "weights": eps["eps"]}
    yield (
        "expert norm, weights, eps of rows",
        "expert_scaled_norm",
        [z(), alpha(4, width)],
        ({"order": order, "weights": eps["eps"]} | eps),
    )

    yield "residual", "residual_norm", [z(), z(), alpha()], {}
    yield "residual, float32 stream, eps of rows", "residual_norm", [z(), z(wide), alpha()], eps
    for stream in (torch.bfloat16, wide):
        for norm in (alpha(), None):
            label = ("" if norm is None else ", two alphas") + (", float32 stream" if stream == wide else "")
            kept = {"kept": z()} | narrow if stream == wide else {}
            yield f"post-norm{label}", "residual_postnorm", [z(), z(stream), norm, alpha()], kept
            yield f"pre-norm{label}", "residual_prenorm", [z(), z(stream), norm, alpha()], narrow
    yield "pre-norm, two alphas, eps of rows", "residual_prenorm", [z(), z(), alpha(), alpha()], eps

    for head_dim in (64, 128):
        heads = {"n_heads": width // head_dim}
        tables = dict(zip(("cos", "sin"), sdd_F.rope_tables(ROWS, head_dim), strict=True))
        yield f"qk of heads of {head_dim}", "qk_norm_rope", [z(), alpha(head_dim)], heads | tables | {"group": head_dim}
    yield "qk", "qk_norm_rope", [z(), alpha()], heads | tables
    yield "rope", "qk_norm_rope", [z(), None], heads | tables


def run(name: str, tensors: list[Tensor | None], others: dict[str, Any]) -> None:
    """Run an operation forward and backward, with a gradient for each of its outputs."""
    eps = others.get("eps")
    leaves = [x.requires_grad_() for x in (*tensors, eps) if x is not None]
    y = getattr(kernels, name)(*tensors, **others)
    y = (y,) if isinstance(y, Tensor) else y
    torch.autograd.grad(y, leaves, [torch.empty_like(part) for part in y], allow_unused=True)


def launches(widths: list[int]) -> list[Launch]:
    """Every different kernel that the operations launch on rows of these widths."""
    backend, found = make_backend(TARGET), {}
    operation, width = "", 0

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs["debug"] = False
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, *parts = kernel._pack_args(backend, kwargs, bound, specialization, options)
        launch = Launch(operation, width, kernel, ASTSource(kernel, *parts), options)
        found.setdefault((launch.name, width, str(parts), str(options)), launch)

    with (
        patch.object(JITFunction, "run", record),
        patch.object(common, "INTERPRETED", True),  # lets CPU tensors pass
        patch.object(common, "_n_multiprocessors", lambda device: MULTIPROCESSORS),
        kernels.use("triton"),
    ):
        for width in widths:
            for label, name, tensors, others in operations(width):
                operation = label
                run(name, tensors, others)
    return list(found.values())


def compiled(launch: Launch) -> Usage:
    """Compile a kernel and read its resources from the binary."""
    binary = triton.compile(launch.source, target=TARGET, options=launch.options.__dict__)
    registers, stack = read_resources(binary.asm["cubin"])
    warps = launch.options.num_warps
    resident = warps * resident_programs(registers, warps, binary.metadata.shared)
    limit = launch.options.maxnreg
    counted_on = warps * common.programs_an_sm(warps, limit) if limit else 0
    return Usage(launch.name, launch.operation, launch.width, warps, registers, stack, resident, counted_on)


def read_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from the binary of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\bREG:(\d+) STACK:(\d+)", text)
    if len(found) != 1:
        raise ValueError(f"cuobjdump -res-usage printed {len(found)} lines of registers and stack, expected 1:\n{text}")
    registers, stack = map(int, found[0])
    return registers, stack


def resident_programs(registers: int, warps: int, shared: int) -> int:
    """Programs that a multiprocessor of an H100 holds at once: NVIDIA's occupancy calculation.

    Registers are given out by 256 a warp, to each of four schedulers from its own quarter of them.
    """
    of_a_warp = common.cdiv(registers * 32, 256) * 256
    by_registers = REGISTERS // 4 // of_a_warp * 4 // warps
    by_memory = SHARED // (common.cdiv(shared, 128) * 128 + 1024)  # 1 KiB of each program is the system's
    return min(by_registers, by_memory, WARPS // warps, PROGRAMS)


def faults(usages: list[Usage], spills: tuple[Spill, ...]) -> list[str]:
    """One line for each spill beyond the list, each entry that no kernel needs, each launch that overfills an SM."""
    listed = {(spill.kernel, spill.width): spill for spill in spills}
    found, widths = [], {usage.width for usage in usages}
    for usage in usages:
        where = f"{usage.kernel} at {usage.width} ({usage.operation})"
        if usage.resident < usage.counted_on:
            found.append(f"{where}: an SM holds {usage.resident} warps, and its launch counts on {usage.counted_on}")
        if usage.stack == 0:
            continue
        spill = listed.get((usage.kernel, usage.width))
        if spill is None or usage.stack > spill.most:
            allowed = "is not on the list of spills" if spill is None else f"may spill {spill.most} bytes at most"
            found.append(f"{where} spills {usage.stack} bytes a thread, and {allowed}")
    spilling = {(usage.kernel, usage.width) for usage in usages if usage.stack}
    for kernel, width in listed:
        if width in widths and (kernel, width) not in spilling:
            found.append(f"{kernel} at {width} is on the list of spills and spills no longer: take it off")
    return found


def table(usages: list[Usage]) -> list[str]:
    """Aligned lines, by kernel and width."""
    header = ("kernel", "of", "width", "warps", "registers", "stack", "resident warps")
    ordered = sorted(usages, key=lambda usage: (usage.kernel, usage.operation, usage.width))
    rows = [(u.kernel, u.operation, u.width, u.warps, u.registers, u.stack, u.resident) for u in ordered]
    return aligned([header, *rows], right=range(2, 7))


def main() -> int:
    """Run the check and return its exit code."""
    parser = argparse.ArgumentParser(prog="dev kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=list(WIDTHS), help="features of a row, multiples of 128"
    )
    arguments = parser.parse_args()
    if bad := [width for width in arguments.widths if width < 128 or width % 128]:
        parser.error(f"--widths: got {bad[0]}, expected a multiple of 128")
    if triton.__version__ != TRITON:
        installed = f"Triton {triton.__version__} is installed and this check was written for {TRITON}"
        print(f"compile_kernels: {installed}: it may fail, or count other registers", file=sys.stderr)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        usages = list(pool.map(compiled, launches(arguments.widths)))
    wrong = faults(usages, SPILLS)
    if arguments.json:
        spills, rows = [asdict(spill) for spill in SPILLS], [asdict(usage) for usage in usages]
        report = {"triton": triton.__version__, "target": "sm_90", "kernels": rows, "spills": spills, "faults": wrong}
        print(json.dumps(report, indent=1))
    else:
        print(*table(usages), sep="\n")
        spilling = sum(usage.stack > 0 for usage in usages)
        print(f"\n{len(usages)} kernels; {spilling} spill; {WARPS} warps are the most that an SM holds")
    print(*(f"compile_kernels: {line}" for line in wrong), sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
