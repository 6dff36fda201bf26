"""`benchmarks/compile_kernels.py` on experts' output norm alone, for `test_kernels_build.py`."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import torch

import compile_kernels

every_operation = compile_kernels.operations


def of_experts(width: int) -> Any:
    for label, name, (z, *alphas), others in every_operation(width):
        if name == "expert_scaled_norm":
            assert z is not None
            for dtype in (torch.bfloat16, torch.float32):
                yield f"{label}, {dtype}", name, [z.detach().to(dtype), *alphas], others


compile_kernels.operations = of_experts
compile_kernels.SPILLS = ()
sys.argv = ["compile_kernels", "--json", "--widths", "2048", "4096", "8192", "16384"]
sys.exit(compile_kernels.main())
