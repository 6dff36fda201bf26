"""Memory kept for backward: an operation's inputs and outputs, or half of their bytes, and a few numbers per row."""

from typing import Any

import pytest
import torch
from helpers_kernels import DEVICE, drawn
from torch import Tensor

from sdd import kernels
from sdd.functional import rope_tables
from sdd.kernels.dispatch import HAS_TRITON

ROWS, WIDTH = 6, 32
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


def activation(i: int = 0) -> Tensor:
    return drawn(i, 2, ROWS // 2, WIDTH, dtype=torch.bfloat16).requires_grad_()


def wide(i: int = 0) -> Tensor:
    """A float32 stream, as under autocast."""
    return activation(i).detach().float().requires_grad_()


def alpha(i: int = 9) -> Tensor:
    return drawn(i, WIDTH).requires_grad_()


def kept_bytes(path: kernels.Path, name: str, arguments: dict[str, Any]) -> int:
    """Bytes of the tensors saved by one call, alphas and tables not counted."""
    given = {id(value) for key, value in arguments.items() if isinstance(value, Tensor) and key in NOT_COUNTED}
    pointers = {value.data_ptr() for value in arguments.values() if isinstance(value, Tensor) and id(value) in given}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() and tensor.data_ptr() not in pointers:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with kernels.use(path), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = getattr(kernels, name)(**arguments)
    assert y is not None
    return sum(tensor.nbytes for tensor in kept.values())


NOT_COUNTED = {"alpha", "post_alpha", "norm_alpha", "alpha_gate", "alpha_up", "cos", "sin"}
COS, SIN = rope_tables(ROWS // 2, WIDTH // 4, device=DEVICE)
#: Arguments, activations kept and float32 numbers a row kept.
KEPT: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "norm": ("scaled_norm", {"z": activation(), "alpha": alpha()}, 1, 1),
    "norm by head": ("scaled_norm", {"z": activation(), "alpha": alpha(), "group": 8}, 1, 4),
    "swiglu": (
        "sdd_swiglu",
        {"z_gate": activation(), "z_up": activation(1), "alpha_gate": alpha(), "alpha_up": alpha(8)},
        2,
        2,
    ),
    "residual": ("residual_norm", {"z": activation(), "residual": activation(1), "alpha": alpha()}, 1, 1),
    "post-norm": (
        "residual_norm",
        {"z": activation(), "residual": activation(1), "alpha": alpha(), "post_alpha": alpha(8)},
        2,
        2,
    ),
    "plain post-norm": (
        "residual_norm",
        {"z": activation(), "residual": activation(1), "alpha": None, "post_alpha": alpha()},
        2,
        1,
    ),
    "post-norm of a wide stream": (
        "residual_postnorm",
        {"z": activation(), "residual": wide(1), "alpha": alpha(), "post_alpha": alpha(8), "kept": activation(2)}
        | {"dtype": torch.bfloat16},
        2,
        2,
    ),
    "plain post-norm of a wide stream": (
        "residual_norm",
        {"z": activation(), "residual": wide(1), "alpha": None, "post_alpha": alpha(8), "kept": activation(2)},
        2,
        1,
    ),
    "norm of a wide stream": ("scaled_norm", {"z": wide(), "alpha": alpha(), "dtype": torch.bfloat16}, 1, 1),
    "pre-norm of a wide stream": (
        "residual_prenorm",
        {"z": activation(), "residual": wide(1), "alpha": None, "norm_alpha": alpha(8), "dtype": torch.bfloat16},
        1,
        1,
    ),
    "pre-norm": (
        "residual_prenorm",
        {"z": activation(), "residual": activation(1), "alpha": alpha(), "norm_alpha": alpha(8)},
        2,
        2,
    ),
    "qk": (
        "qk_norm_rope",
        {"z": activation(), "alpha": alpha(), "cos": COS, "sin": SIN, "n_heads": 4, "group": 8},
        1,
        4,
    ),
    "rope": ("qk_norm_rope", {"z": activation(), "alpha": None, "cos": COS, "sin": SIN, "n_heads": 4}, 0, 0),
}


@pytest.mark.parametrize("name", KEPT)
def test_kernels_keep_their_inputs_and_the_statistics(name: str) -> None:
    function, arguments, activations, numbers = KEPT[name]
    expected = ROWS * (activations * WIDTH * 2 + numbers * 4)
    assert kept_bytes("triton", function, arguments) == expected


@pytest.mark.parametrize("name", ["norm", "norm by head"])
def test_recomputation_keeps_the_same(name: str) -> None:
    function, arguments, activations, numbers = KEPT[name]
    assert kept_bytes("recompute", function, arguments) == ROWS * (activations * WIDTH * 2 + numbers * 4)
    assert kept_bytes("composed", function, arguments) > 2 * ROWS * WIDTH * 4


@pytest.mark.skipif(DEVICE != "cuda", reason="measures a CUDA device's memory")
@pytest.mark.parametrize("name", KEPT)
def test_memory_that_stays_allocated(name: str) -> None:
    """Of a large call: the outputs and the statistics, and within its backward pass only gradients and partial sums."""
    function, arguments, _, numbers = KEPT[name]
    large = dict(arguments)
    for key, value in arguments.items():
        if isinstance(value, Tensor) and value.ndim == 3:
            large[key] = value.detach().repeat(1, 4096, 1).requires_grad_()
    if "cos" in large:
        large["cos"], large["sin"] = rope_tables(4096 * ROWS // 2, WIDTH // 4, device=DEVICE)
    with kernels.use("triton"):
        getattr(kernels, function)(**large)  # compiles
        before = torch.cuda.memory_allocated()
        y = getattr(kernels, function)(**large)
    y = (y,) if isinstance(y, Tensor) else y
    grown = torch.cuda.memory_allocated() - before
    # norm(z) in place of a wide z, which others may let go
    narrow = 4096 * ROWS * WIDTH * 2 if name in ("norm of a wide stream", "pre-norm of a wide stream") else 0
    expected = sum(part.nbytes for part in y) + 4096 * ROWS * numbers * 4 + narrow
    assert grown == pytest.approx(expected, rel=0.02, abs=8192)
