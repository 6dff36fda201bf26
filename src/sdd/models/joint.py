"""Calling two projections that share one norm, so that neither can be called alone."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from sdd.errors import UserError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in _HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook looks at the module's calls, not counting hooks of all modules."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def has_global_hooks() -> bool:
    """Whether a hook looks at the calls of all modules."""
    return any(getattr(module_globals, hooks) for hooks in _GLOBAL_HOOKS)


def call_jointly(
    gate: nn.Module,
    up: nn.Module,
    kind: type[nn.Module],
    compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    """`compute(x, x)`, the outputs of gate and up, with the hooks of both around it as if each were called.

    Args:
        gate: the first projection.
        up: the second.
        kind: the class of both.
        compute: takes the inputs of gate and up, which a hook may have changed.
        x: the input.
        others: what else the projections are called with.

    Raises:
        UserError: if an adapter or another module stands in the place of one.
    """
    for name, layer in (("gate_proj", gate), ("up_proj", up)):
        if not isinstance(layer, kind) or type(layer).forward is not kind.forward or "forward" in vars(layer):
            raise UserError(
                f"{name} is a {type(layer).__name__} with a forward pass of its own: this placement norms gate and up "
                f"together, so that each must stay a {kind.__name__}. Adapt other projections, or take a placement "
                "that norms them apart"
            )
    if not (has_hooks(gate) or has_hooks(up) or has_global_hooks()):
        return compute(x, x)
    outputs: dict[str, Tensor] = {}

    def forward_gate(x_gate: Tensor, *_: Any) -> Tensor:
        def forward_up(x_up: Tensor, *_: Any) -> Tensor:
            outputs["gate"], y_up = compute(x_gate, x_up)
            return y_up

        outputs["up"] = _call(up, forward_up, x, *others)
        return outputs["gate"]

    return _call(gate, forward_gate, x, *others), outputs["up"]


def _call(layer: nn.Module, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call a module with another forward pass."""
    vars(layer)["forward"] = forward
    try:
        return layer(*inputs)
    finally:
        del vars(layer)["forward"]
