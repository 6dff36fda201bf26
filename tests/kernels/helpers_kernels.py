"""An operation on one path against its float64 reference: values and all gradients, on drawn layouts."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ["recompute", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = 300 if DEVICE == "cuda" else 24
LAYOUTS = ["contiguous", "columns of a wider matrix", "every other row", "transposed", "broadcast"]

seeds = st.integers(0, 2**31)
# few rows: interpreted, each costs some ten milliseconds
leading = st.sampled_from([(), (1,), (5,), (2, 2), (3, 1, 2), (0,), (2, 0)])
layouts = st.sampled_from(LAYOUTS)
dtypes = st.sampled_from(DTYPES)

Outputs = Tensor | tuple[Tensor, ...]
Arguments = Mapping[str, Any]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    """Normal numbers of that shape and dtype, in storage of that layout."""
    generator = torch.Generator().manual_seed(seed % 2**63)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    if not shape or layout == "contiguous":
        return randn(*shape)
    *front, width = shape
    match layout:
        case "columns of a wider matrix":
            return randn(*front, width + 5)[..., 2 : width + 2]
        case "every other row":
            return randn(*front[:-1], 2 * front[-1], width)[..., ::2, :] if front else randn(2 * width)[::2]
        case "transposed":
            return randn(*reversed(shape)).permute(*reversed(range(len(shape))))
        case "broadcast":
            return randn(1).expand(shape)
    raise ValueError(layout)


def run(function: Callable[..., Outputs], arguments: Arguments, gradients: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of every floating argument that is a tensor, by its name's order."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items() if differentiable(name, value)}
    outputs = function(**{**arguments, **leaves})
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients, materialize_grads=True)
    return [*(output.detach() for output in outputs), *found]


def differentiable(name: str, value: object) -> bool:
    return isinstance(value, Tensor) and name not in ("cos", "sin", "kept")


def check(
    path: str,
    name: str,
    reference: Callable[..., Outputs],
    arguments: Arguments,
    seed: int,
    layout: str,
    rounded_inside: bool = False,
) -> None:
    """`sdd.kernels.<name>` on that path equals `reference` in float64, gradients of a drawn layout included.

    `rounded_inside`: intermediate results are rounded to the dtype of the activations too.
    """
    wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    wide.pop("dtype", None)
    with kernels.use(path), torch.no_grad():
        outputs = getattr(kernels, name)(**arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = [drawn(seed + i, *y.shape, dtype=y.dtype, layout=layout) for i, y in enumerate(outputs)]
    with kernels.use(path):
        found = run(getattr(kernels, name), arguments, gradients)
    expected = run(reference, wide, [gradient.double() for gradient in gradients])
    labels = [f"output {i}" for i in range(len(outputs))]
    labels += [key for key, value in arguments.items() if differentiable(key, value)]
    inside = max(torch.finfo(y.dtype).eps for y in outputs) if rounded_inside else 0.0
    for label, ours, theirs in zip(labels, found, expected, strict=True):
        if label in arguments:
            assert ours.dtype == arguments[label].dtype, label
        assert_close(ours, theirs, label, inside)


def assert_close(ours: Tensor, theirs: Tensor, label: str, inside: float = 0.0) -> None:
    """Equal up to float32 arithmetic on numbers of order 1 or the largest there is, and one rounding to ours's dtype.

    The interpreter cuts digits off where a GPU rounds: a whole unit in the last place. `inside` is the unit to which
    intermediate results are rounded.
    """
    assert ours.shape == theirs.shape, label
    scale = max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
    atol = (2e-5 + 2 * inside) * scale
    rtol = 1.01 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol, msg=lambda text: f"{label}: {text}")
