"""Experts with stacked matrices: modules of transformers' interface for implementations of experts.

Classes of Mixtral, Qwen-MoE, OLMoE, GPT-OSS, DeepSeek and others keep one three-dimensional parameter for all experts,
and their forward may be replaced by any function of transformers' experts interface: it says in attributes how the
weights are laid out. The forward here is one more such function. It belongs to the class of a converted module, not to
`config._experts_implementation`, which transformers' exporters and its generation change for a while: the norms would
be gone without a word.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sdd.conversion.kinds import unwritable
from sdd.kernels.experts import Order, by_row, collect, dispatch, expert_scaled_norm, grouped_linear, sort_by_expert
from sdd.nn import SDDLinear
from sdd.parameters import draw_, keep_wide, new_alpha, widen

#: What transformers' decorator notes on a module of the interface.
_LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class SDDExperts(nn.Module):
    """The part of a converted module of experts that knows of alpha; mixed in before the module's own class.

    For each expert e, `y = alpha_e * norm(V_e x) + b_e` for the matrices that have an alpha, named after its matrix
    (`down_proj_alpha`, `[experts, out_features]`, at least float32). Gate and up have one matrix, and a norm each.

    Attributes:
        alpha_names: names of the alphas.
        alpha_inits: their initial values, in this order.
        eps: added to the mean square, inside the root.
    """

    alpha_names: tuple[str, ...]
    alpha_inits: tuple[float, ...]
    eps: float

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum what the experts of each token give, times the router's weights; `[N, I]` to `[N, I]`."""
        return sdd_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draw the matrices that have an alpha as `sdd.convert` does, and set their biases to zero."""
        for name in self.alpha_names:
            key = name.removesuffix("_alpha")
            draw_(getattr(self, key), expert_shape(self, key)[2], generator)
            bias = self._parameters.get(f"{key}_bias")
            if bias is not None:
                nn.init.zeros_(bias)

    def reset_parameters(self) -> None:
        """Draw as above, and set each alpha to its initial value."""
        self.draw()
        for name, value in zip(self.alpha_names, self.alpha_inits, strict=True):
            nn.init.constant_(getattr(self, name), value)

    def extra_repr(self) -> str:
        """The shape of each matrix, as experts, out_features, in_features, and eps."""
        keys = [name.removesuffix("_alpha") for name in self.alpha_names]
        return ", ".join([*(f"{key}={list(expert_shape(self, key))}" for key in keys), f"eps={self.eps:g}"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `.half()`, `.to(...)` and the like; alphas stay at least float32."""
        return keep_wide(self, self.alpha_names, lambda: super(SDDExperts, self)._apply(fn, recurse))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        widen(self, self.alpha_names)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the module's own class, since the mixed one has no name of its own."""
        return _rebuild, (plain_class(type(self)),), self.__getstate__()


#: What a conversion makes.
SDDModule = SDDLinear | SDDExperts


def matrices(module: SDDModule) -> list[tuple[Tensor, Tensor]]:
    """V, as it is stored, and alpha of each matrix of an SDD layer or of converted experts."""
    if isinstance(module, SDDLinear):
        return [(module.weight, module.alpha)]
    return [(getattr(module, name.removesuffix("_alpha")), getattr(module, name)) for name in module.alpha_names]


def has_experts(module: nn.Module) -> bool:
    """Whether a module's forward goes through transformers' experts interface."""
    forward: Any = type(module).forward
    code = getattr(forward, "__code__", None)
    dispatches = "experts_interface" in getattr(code, "co_freevars", ())
    return dispatches and all(hasattr(module, attribute) for attribute in _LAYOUT) and "forward" not in vars(module)


def expert_keys(module: Any) -> list[str]:
    """The names of the matrices, those that write last."""
    return ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]


def expert_shape(module: Any, key: str) -> tuple[int, int, int]:
    """Experts, out_features, in_features of a stacked matrix, whatever way it is laid out."""
    n, rows, columns = getattr(module, key).shape
    return (n, columns, rows) if module.is_transposed else (n, rows, columns)


def expert_parts(module: Any, key: str) -> tuple[tuple[int, int], ...] | None:
    """Gate and up, which have a norm each, as the parts of the outputs of their common matrix; None for another one."""
    width = expert_shape(module, key)[1] // 2
    return ((width, width), (width, width)) if key == "gate_up_proj" else None


def expert_obstacle(module: Any, key: str) -> str | None:
    """Why a stacked matrix of an experts module cannot be converted; None if it can."""
    weight = module._parameters.get(key)
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
        return "its weight is no plain parameter of a 16-, 32- or 64-bit float"
    if (reason := unwritable(weight)) is not None:
        return reason
    if module._is_expert_parallel:
        return "its experts are spread over processes: convert before parallelising"
    return None


def become_sdd_experts(module: Any, alphas: dict[str, float], eps: float) -> SDDExperts:
    """Give an experts module an alpha for each of its matrices named in `alphas`, and change its class in place."""
    for key, value in alphas.items():
        n, n_out, _ = expert_shape(module, key)
        module.register_parameter(f"{key}_alpha", new_alpha(getattr(module, key), (n, n_out), value))
    module.alpha_names = tuple(f"{key}_alpha" for key in alphas)
    module.alpha_inits, module.eps = tuple(alphas.values()), eps
    module.__class__ = _mixed(type(module))
    return module


def sdd_experts_forward(module: Any, x_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """One function of transformers' experts interface, with SDD where the module has an alpha.

    Args:
        module: an experts module of transformers with alphas.
        x_NI: tokens.
        experts_NK: the experts of each token.
        weights_NK: their weights.

    Returns:
        `[N, I]` in the dtype of x.
    """
    if module._is_expert_parallel:
        raise ValueError("SDD experts cannot be spread over processes by transformers' expert parallelism")
    order = sort_by_expert(experts_NK, len(module.down_proj))
    first, last = expert_keys(module)
    hidden = after_first(module, _projection(module, first, dispatch(x_NI, order), order))
    return after_last(module, _projection(module, last, hidden, order), weights_NK, order).to(x_NI.dtype)


def after_first(module: Any, y_M: Tensor) -> Tensor:
    """What the second projection of the experts reads, from what the first one puts out."""
    return module._apply_gate(y_M) if module.has_gate else module.act_fn(y_M)


def after_last(module: Any, y_MI: Tensor, weights_NK: Tensor, order: Order) -> Tensor:
    """The sum over the experts of each token, `[N, I]`, from what the last projection puts out."""
    if getattr(module, "has_post_expert_norm", False):
        y_MI = module.post_expert_norm(y_MI)
    return collect(y_MI * by_row(weights_NK, order).unsqueeze(-1), order)


def product(module: Any, key: str, x: Tensor, order: Order) -> Tensor:
    """`V_e x` for each row, e being its expert."""
    weight = getattr(module, key)
    return grouped_linear(x, weight.transpose(1, 2) if module.is_transposed else weight, order.ends_E)


def normed(module: Any, key: str, z: Tensor, alpha: Tensor, order: Order, eps: float) -> Tensor:
    """`alpha_e * norm(z)` for each row, gate and up with a norm each."""
    if key != "gate_up_proj":
        return expert_scaled_norm(z, alpha, order, eps=eps)
    z, alpha = side_by_side(module, key, z), side_by_side(module, key, alpha)
    pairs = zip(z.chunk(2, -1), alpha.chunk(2, -1), strict=True)
    return interleaved(module, key, torch.cat([expert_scaled_norm(part, a, order, eps=eps) for part, a in pairs], -1))


def with_bias(module: Any, key: str, y: Tensor, order: Order) -> Tensor:
    """Add the bias of each row's expert, if the module has any."""
    return y + getattr(module, f"{key}_bias")[order.experts_M] if module.has_bias else y


def side_by_side(module: Any, key: str, values: Tensor) -> Tensor:
    """Outputs of a matrix with those of gate before those of up, where the module interleaves them."""
    if key != "gate_up_proj" or module.is_concatenated:
        return values
    return torch.cat([values[..., 0::2], values[..., 1::2]], -1)


def interleaved(module: Any, key: str, values: Tensor) -> Tensor:
    """The way back from `side_by_side`."""
    if key != "gate_up_proj" or module.is_concatenated:
        return values
    return torch.stack(values.chunk(2, -1), -1).flatten(-2)


def _projection(module: Any, key: str, x: Tensor, order: Order) -> Tensor:
    z, alpha = product(module, key, x, order), module._parameters.get(f"{key}_alpha")
    return with_bias(module, key, z if alpha is None else normed(module, key, z, alpha, order, module.eps), order)


def become_plain_experts(module: Any) -> None:
    """Change the class of a converted experts module back, in place; its alphas and eps are gone."""
    for name in module.alpha_names:
        delattr(module, name)
    for name in ("alpha_names", "alpha_inits", "eps"):
        delattr(module, name)
    vars(module).pop("digests", None)
    module.__class__ = plain_class(type(module))


def plain_class(mixed: type) -> type:
    """The class that a converted experts module had."""
    return mixed.__mro__[2]


_classes: dict[type, type] = {}


def _mixed(cls: type) -> type:
    """The class of a converted module: SDDExperts before its own; one for each class, as if it were written out."""
    if cls not in _classes:
        _classes[cls] = type(f"SDD{cls.__name__}", (SDDExperts, cls), {"__module__": cls.__module__})
    return _classes[cls]


def _rebuild(cls: type) -> Any:
    return object.__new__(_mixed(cls))
