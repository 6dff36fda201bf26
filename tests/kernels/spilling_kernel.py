"""`benchmarks/compile_kernels.py` on a kernel that must spill. Run by `test_kernels_build.py`.

--listed      the list of spills allows it
--crowded     its launch limits its registers, and an SM holds fewer programs than these registers allow
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import torch
import triton
import triton.language as tl

import compile_kernels

jit: Any = triton.jit


@jit
def held(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """512 numbers a thread, all needed before and after a sum: no thread has more than 255 registers."""
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column)
    tl.store(y_ptr + column, x / tl.sum(x))


def launch(*_: Any) -> None:
    x = torch.empty(16_384)
    held[(1,)](x, torch.empty_like(x), BLOCK=16_384, num_warps=1, **limit)


limit = {}
if "--crowded" in sys.argv:
    limit, compile_kernels.PROGRAMS = {"maxnreg": 128}, 8
compile_kernels.operations = lambda width: [("held", "", [], {})]
compile_kernels.run = launch
listed = compile_kernels.Spill("__main__.held", 2048, 10_000, "a test")
compile_kernels.SPILLS = (listed,) if {"--listed", "--crowded"} & set(sys.argv) else ()
sys.argv = ["compile_kernels", "--json", "--widths", "2048"]
sys.exit(compile_kernels.main())
