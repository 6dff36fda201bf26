"""Operations and models on the meta device, whose numbers no one can read, as a GPU would run them: what waits there.

A read of a number on the host, or a shape that depends on numbers, raises on the meta device. A copy from the host
does not: `HostWaits` records both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from sdd.kernels.dispatch import HAS_TRITON

COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim"}
READS |= {"aten::equal", "aten::is_nonzero", "aten::bincount", "aten::repeat_interleave", "aten::_pin_memory"}
#: Additions whose order is not fixed on a GPU.
UNORDERED = {"aten::index_add", "aten::index_add_", "aten::scatter_add", "aten::scatter_add_", "aten::scatter_reduce"}
UNORDERED |= {"aten::scatter_reduce_", "aten::histc", "aten::bincount", "aten::put_"}
MODULES = ("expert_norm", "qk_norm_rope", "residual_norm", "scaled_norm", "swiglu")


#: What makes a tensor of numbers that are on the host.
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class _FromHost(TorchFunctionMode):
    """Records tensors made of numbers on the host, which the meta device does not copy."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FROM_HOST and result.device.type == "meta":
            self.waits.append(func.__name__)
        return result


class HostWaits(TorchDispatchMode):
    """Records the operations for which the host waits, those that add in no fixed order, and all of them.

    Attributes:
        known: operations that wait inside, which the meta device does not show.
    """

    def __init__(self, known: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.known = known
        self.waits: list[str] = []
        self.unordered: list[str] = []
        self.seen: set[str] = set()
        self._from_host = _FromHost(self.waits)

    def __enter__(self) -> "HostWaits":
        self._from_host.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._from_host.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.seen.add(name)
        if name in READS or name in self.known:
            self.waits.append(name)
        if name in UNORDERED or (name.startswith("aten::index_put") and True in args[3:]):
            self.unordered.append(name)
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_iter((args, kwargs, result)) if isinstance(x, Tensor)}
        if name in COPIES and len(devices) > 1:
            self.waits.append(name)
        return result


def on_meta(arguments: Any) -> Any:
    """The same arguments without numbers; tensors of floating numbers get gradients."""

    def move(x: Tensor) -> Tensor:
        return x.to("meta").requires_grad_(x.is_floating_point())

    return tree_map_only(Tensor, move, arguments)


@contextmanager
def launches_shown(mode: HostWaits) -> Iterator[None]:
    """Operations on meta tensors do all that they do on a GPU, under the mode, but for the kernels themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which does not know the meta device
        patch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **_options: None)
        if HAS_TRITON:
            _show_launches(mode, patch)
        yield


def _show_launches(mode: HostWaits, patch: pytest.MonkeyPatch) -> None:
    from torch._library.custom_ops import CustomOpDef
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    def shown(launch: Any) -> Any:
        def run(*args: Any) -> Any:
            with mode:
                return launch(*args)

        return run

    for kernel, method in ((GridExecutor, "__call__"), (JITFunction, "run")):
        patch.setattr(kernel, method, lambda *_args, **_options: None)
    for module in MODULES:
        for operation in vars(import_module(f"sdd.kernels.fused.{module}")).values():
            if isinstance(operation, CustomOpDef):
                patch.setattr(operation, "_abstract_fn", shown(operation._init_fn))
