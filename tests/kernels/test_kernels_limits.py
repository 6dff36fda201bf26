"""Limits of the kernels: wide rows, far offsets, zero rows, repetition, and PyTorch's own checks of operations."""

from importlib import import_module
from typing import Any

import pytest
import torch
from helpers_kernels import DEVICE, EXAMPLES, check, drawn, dtypes, seeds
from helpers_operations import ACTIVATIONS, OPERATIONS, arguments_of, outputs_of, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdd import functional as sdd_F
from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")

CHECKED = ["scaled_norm", "narrow norm", "sdd_swiglu", "bare up", "qk", "rope"]
CHECKED += ["post-norm", "post-norm, copy", "plain post-norm", "narrow pre-norm", "plain pre-norm"]


TWO_KERNELS = {"MAX_BLOCK": 16, "MAX_FUSED": 16, "MAX_PAIR": 16, "WIDE_BLOCK": 8, "COLUMN_BLOCK": 8}
BLOCKS_IN_TURN = {"HELD_BLOCK": 8, "LOOP_BLOCK": 8}
#: One sum of such a row fits into a program, two do not.
ONE_SUM_FITS = BLOCKS_IN_TURN | {"MAX_SUMS": 4, "WIDE_BLOCK": 8, "COLUMN_BLOCK": 8}


@pytest.mark.parametrize("sizes", [TWO_KERNELS, BLOCKS_IN_TURN, ONE_SUM_FITS], ids=["two kernels", "blocks", "one sum"])
@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=max(1, EXAMPLES // 30))
@given(seed=seeds, quarter=st.integers(5, 8), dtype=dtypes)
def test_rows_wider_than_a_program_holds(
    name: str, sizes: dict[str, int], seed: int, quarter: int, dtype: torch.dtype
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("common", "scaled_norm_kernels", "swiglu", "residual_norm", "qk_norm_rope"):
            for constant, value in sizes.items():
                module_ = import_module(f"sdd.kernels.fused.{module}")
                if hasattr(module_, constant):
                    patch.setattr(module_, constant, value)
        function, arguments = arguments_of(name, 4 * quarter, lambda i: drawn(seed + i, 2, 4 * quarter, dtype=dtype))
        rounded = "dtype" in arguments or dtype != torch.float32  # two kernels round what they hand on
        check("triton", function, getattr(sdd_F, function), arguments, seed + 9, "contiguous", rounded)


@given(width=st.integers(1, 16_384), sums=st.integers(1, 2))
def test_a_program_covers_its_row_and_fits_its_multiprocessor(width: int, sums: int) -> None:
    common = import_module("sdd.kernels.fused.common")
    shape = common.row_shape(width, sums)
    assert width <= shape.block * shape.blocks < 2 * width + common.LOOP_BLOCK
    programs = common.programs_an_sm(shape.warps, shape.registers)
    assert programs * shape.warps * 32 * shape.registers <= common.REGISTERS


def test_only_nvidia_takes_a_limit_of_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    common = import_module("sdd.kernels.fused.common")
    shape = common.row_shape(2048, 2)
    monkeypatch.setattr(torch.version, "hip", None)
    assert shape.options["maxnreg"] == shape.registers
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "maxnreg" not in shape.options


@given(width=st.integers(1, 16_384), sums=st.integers(1, 2), n_rows=st.integers(1, 10_000), n_blocks=st.integers(1, 64))
def test_no_more_programs_than_rows_or_than_fit_at_once(width: int, sums: int, n_rows: int, n_blocks: int) -> None:
    common = import_module("sdd.kernels.fused.common")
    shape = common.row_shape(width, sums)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_n_multiprocessors", lambda device: 132)
        programs = common.n_programs(torch.empty(0), n_rows, shape, n_blocks)
    assert 1 <= programs <= n_rows
    at_once = 132 * common.programs_an_sm(shape.warps, shape.registers)
    assert programs * n_blocks <= max(at_once, n_blocks)


@pytest.mark.parametrize("name", OPERATIONS if DEVICE == "cuda" else ["scaled_norm", "swiglu", "residual", "qk"])
def test_rows_of_65536_features(name: str) -> None:
    function, arguments = arguments_of(name, 65_536, lambda i: drawn(i, 2, 65_536, dtype=torch.bfloat16))
    rounded = "norm" in name or name == "qk"  # two kernels, and a rounding in between
    check("triton", function, getattr(sdd_F, function), arguments, 9, "contiguous", rounded)


@pytest.mark.parametrize("name", OPERATIONS)
def test_offsets_beyond_two_to_the_31(name: str) -> None:
    """Two rows whose distance in memory does not fit into 32 bits together with their index."""
    width, distance = 8, 2**30 + 8
    far = torch.empty(2 * distance + width, dtype=torch.bfloat16, device=DEVICE)  # pages that no one touches
    view = far.as_strided((2, width), (2 * distance, 1))
    view.copy_(drawn(0, 2, width))
    three = far.as_strided((3, width), (distance, 1))
    three.copy_(drawn(0, 3, width))

    function, near = arguments_of(name, width, lambda i: three.clone())
    _, strided = arguments_of(name, width, lambda i: three)
    for arguments in (near, strided):
        for key in ("eps", "cos", "sin"):
            if isinstance(arguments.get(key), Tensor):
                arguments[key] = {"eps": drawn(3, 3).square(), "cos": tables(3, 4)[0], "sin": tables(3, 4)[1]}[key]
    with kernels.use("triton"):
        results = []
        for arguments in (near, strided):
            leaves = [arguments[key].detach().requires_grad_() for key in ACTIVATIONS[function]]
            y = getattr(kernels, function)(**arguments | dict(zip(ACTIVATIONS[function], leaves, strict=True)))
            y = outputs_of(y)[0]
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_zero_rows_and_repetition(name: str) -> None:
    """Rows of zeros give what the reference gives, and the same numbers give the same bits."""

    def activation(i: int) -> Tensor:
        return torch.cat([drawn(i, 1, 12), torch.zeros(1, 12, device=DEVICE)])

    function, arguments = arguments_of(name, 12, activation)
    check("triton", function, getattr(sdd_F, function), arguments, 9, "contiguous", "dtype" in arguments)
    with kernels.use("triton"):
        leaves = [value.requires_grad_() for value in arguments.values() if isinstance(value, Tensor)]
        leaves = [leaf for leaf in leaves if leaf is not arguments.get("cos") and leaf is not arguments.get("sin")]

        def once() -> tuple[Tensor, ...]:
            y = outputs_of(getattr(kernels, function)(**arguments))
            return *y, *torch.autograd.grad(sum(part.square().sum() for part in y), leaves)

        assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("name", OPERATIONS)
def test_differentiating_twice_says_what_to_do(name: str) -> None:
    function, arguments = arguments_of(name, 8, lambda i: drawn(i, 2, 8).requires_grad_())
    with kernels.use("triton"):
        y = outputs_of(getattr(kernels, function)(**arguments))[0]
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice .* sdd.kernels.use\('composed'\)"):
            y.sum().backward(create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch of the very calls that an operation makes."""
    function, arguments = arguments_of(name, 8, lambda i: drawn(i, 2, 8).requires_grad_())
    if function == "residual_postnorm":
        arguments["kept"] = arguments["residual"].detach().bfloat16()
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    modules = [
        import_module(f"sdd.kernels.fused.{m}") for m in ("scaled_norm", "swiglu", "residual_norm", "qk_norm_rope")
    ]
    for module in modules:
        for attribute in [key for key in vars(module) if key.endswith("_op")]:
            operation = getattr(module, attribute)

            def recorded(*args: Any, operation: Any = operation) -> Any:
                calls.append((operation, args))
                return operation(*args)

            monkeypatch.setattr(module, attribute, recorded)
    with kernels.use("triton"):
        sum(y.sum() for y in outputs_of(getattr(kernels, function)(**arguments))).backward()
    assert len(calls) == 2
    for operation, args in tuple(calls):  # what opcheck itself calls is recorded too
        if operation is calls[1][0]:  # a backward pass, which has none itself
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        torch.library.opcheck(operation, args)
