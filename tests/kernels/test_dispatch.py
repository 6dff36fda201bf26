"""Who runs an operation, and how one path is forced."""

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import getdoc, signature
from typing import Any

import pytest
import torch
from helpers_kernels import DEVICE

from sdd import functional as sdd_F
from sdd import kernels
from sdd.errors import UserError
from sdd.kernels import experts, recompute
from sdd.kernels.dispatch import HAS_TRITON

LARGE = torch.empty(2048, 1024, device=DEVICE)
SMALL = torch.empty(4, 1024, device=DEVICE)


OPERATIONS = [name for name in kernels.__all__ if name not in ("Path", "path_of", "use")]


def reference_of(name: str) -> Callable[..., Any]:
    return getattr(experts if name.startswith("expert_") else sdd_F, name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_signature_and_the_documentation_of_its_reference(name: str) -> None:
    operation, reference = getattr(kernels, name), reference_of(name)
    assert signature(operation) == signature(reference)
    assert getdoc(operation) == getdoc(reference)
    assert operation.__module__ == "sdd.kernels"


@pytest.mark.parametrize("name", OPERATIONS)
def test_implementations_take_the_arguments_of_their_reference(name: str) -> None:
    from_fused = pytest.importorskip("sdd.kernels.fused.operations") if HAS_TRITON else None
    found = [getattr(module, name, None) for module in (recompute, from_fused)]
    wanted = signature(reference_of(name)).parameters
    for implementation in filter(None, found):
        parameters = signature(implementation).parameters
        named = {key: one.kind for key, one in parameters.items() if one.kind is not one.VAR_KEYWORD}
        assert named.items() <= {key: one.kind for key, one in wanted.items()}.items()
        assert named.keys() == wanted.keys() or len(named) < len(parameters)  # the rest as **options
    assert from_fused is None or found[1] is not None


@pytest.mark.parametrize("path", ["composed", "recompute"])
def test_defaults_are_those_of_the_reference(path: kernels.Path) -> None:
    z, alpha = torch.full((2, 4), 1e-3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    with kernels.use(path):
        torch.testing.assert_close(kernels.scaled_norm(z, alpha), sdd_F.scaled_norm(z, alpha, eps=1e-6))
        by_name = kernels.residual_norm(residual=z, z=z, alpha=alpha, residual_scale=3.0)
    torch.testing.assert_close(by_name, 3 * z + sdd_F.scaled_norm(z, alpha))


def test_by_itself() -> None:
    kernel_device = DEVICE == "cuda" and HAS_TRITON
    assert kernels.path_of(LARGE) == ("triton" if kernel_device else "recompute")
    assert kernels.path_of(LARGE.double()) == "recompute"
    assert kernels.path_of(SMALL) == "composed"
    with torch.no_grad():
        assert kernels.path_of(LARGE) == ("triton" if kernel_device else "composed")


def test_forced_and_given_back() -> None:
    before = kernels.path_of(LARGE)
    with kernels.use("composed"):
        assert kernels.path_of(LARGE) == "composed"
        with kernels.use("recompute"):
            assert kernels.path_of(SMALL) == "recompute"
        assert kernels.path_of(LARGE) == "composed"
    assert kernels.path_of(LARGE) == before


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_forced_where_it_cannot_run() -> None:
    with pytest.raises(UserError, match=r"'fast' .* is not a path .* choose one of auto, composed, recompute, triton"):
        kernels.use("fast").__enter__()  # pyright: ignore[reportArgumentType]
    with kernels.use("triton"), pytest.raises(UserError, match=r"float64: they take float32, bfloat16 and float16"):
        kernels.scaled_norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4))


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("fast", "UserError: 'fast' (from SDD_KERNELS"),
        ("triton", "UserError: the kernels are forced" + (" on a cpu tensor" if HAS_TRITON else " (SDD_KERNELS")),
    ],
)
def test_the_environment_variable(value: str, answer: str) -> None:
    script = "import torch, sdd.kernels as k; print(k.path_of(torch.ones(9)))"
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment | {"SDD_KERNELS": value}, capture_output=True, text=True
    )
    assert answer in done.stderr


def test_the_package_comes_without_triton() -> None:
    """Importing sdd and running on a CPU never imports Triton, so that it need not be there."""
    script = (
        "import sys; sys.modules['triton'] = None; import torch, sdd\n"
        "sdd.SDDLinear(64, 1024)(torch.ones(64, 64)).sum().backward(); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
