"""The layers: `SDDLinear`, `RMSNorm`, and the fully-connected layers of experts.

`SDDLinear` takes the place of `torch.nn.Linear`, `RMSNorm` is the norm at sites that are no projection, `LearnedScale`
is a scale without a norm, and `ExpertLinear` and `SDDExpertLinear` stack one layer for each expert of a mixture.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd import probe_points
from sdd.functional import Eps, Group, alpha_size, norm, resolve_group
from sdd.kernels import expert_scaled_norm, scaled_norm
from sdd.kernels.experts import Order, grouped_linear
from sdd.parameters import draw_, held, keep_wide, new_alpha, widen

Device = torch.device | str | None


class SDDLinear(nn.Module):
    """A fully-connected layer with Scale-Distribution Decoupling, `y = alpha * norm(V x) + b`.

    It has the signature of `torch.nn.Linear`: `.weight` is V, `.bias` is b, and `.alpha` is added.
    `norm(z) = z / sqrt(mean(z^2) + eps)` is taken over the output features of each token, or over groups of them.
    Statistics are float32 (float64 for float64 input), alpha is applied in float32 before the cast back to the dtype
    of `V x`, and the bias comes after the scale.

    The forward pass does not see the scale of V (up to eps): the initial std of V only sets how fast an optimiser
    step turns it.

    It is not a subclass of `nn.Linear`, because code that takes it for a plain matrix would be silently wrong: merging
    a LoRA adapter into V changes the output, a quantiser or serving engine that replaces every `nn.Linear` drops the
    norm, and a training library may draw its weight again. Such code now leaves the layer alone, or refuses it. Code
    that reads `.weight` without asking for the class still sees V alone. Torch has one such case, the fused inference
    path of `nn.TransformerEncoder` and its layer: `sdd.convert` switches it off, and who places an `SDDLinear` there by
    hand calls `torch.backends.mha.set_fastpath_enabled(False)`.

    A state dict of an `nn.Linear` of the same shape loads into it (strictly): V and b are taken from it, alpha keeps
    its present value. That needs the versions that torch keeps beside a state dict. Without them, as in a dict read
    from safetensors, and in a state dict that an `SDDLinear` wrote, a missing alpha is an error of strict loading.

    Args:
        in_features: size of each input token.
        out_features: size of each output token.
        bias: whether to learn an additive bias, applied after the scale.
        device: as in `nn.Linear`; `"meta"` builds the layer without storage.
        dtype: of weight and bias; alpha is at least float32.
        group: norm groups along the output features. None: one group of full width. int: groups of that width
            (heads). A list of `(width, group_width)`: consecutive parts, e.g. a fused q|k|v as
            `[(2048, 64), (512, 64), (512, 0)]`; group_width 0 is a plain part with neither norm nor alpha.
        shared_alpha: one alpha of group width for all groups of a part (e.g. one for all heads).
        alpha_init: initial value of every element of alpha.
        eps: added to the mean square, inside the root.
        scale: whether alpha is learned; without, it is a buffer that stays at `alpha_init` and is in no state dict.

    Attributes:
        parts: `group` as consecutive `(width, group_width)` parts, resolved when the layer is built.
        matrix: V as `[out_features, in_features]`, also where a subclass stores its weight another way.
        paper_draw: whether `reset_parameters` draws as `sdd.convert` does, as for the layers that it made.

    Shapes:
        input `[..., in_features]`, output `[..., out_features]`, alpha `[out_features]` for one group.

    Raises:
        ValueError: if `group` does not fit `out_features`.

    Source: arXiv 2502.15499.
    """

    # State dicts of version 2 must hold alpha. Those of nn.Linear carry version 1.
    _version = 2

    bias: nn.Parameter | None
    paper_draw = False  # of layers that were pickled before it was kept

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group = None,
        shared_alpha: bool = False,
        alpha_init: float = 1.0,
        eps: float = 1e-6,
        scale: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        b = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", b)
        self._add_norm(group, shared_alpha, alpha_init, eps, scale)
        self.reset_parameters()

    def _add_norm(
        self,
        group: Group,
        shared_alpha: bool,
        alpha_init: float,
        eps: float,
        scale: bool = True,
        *,
        paper_draw: bool = False,
    ) -> None:
        """Add alpha and the settings of the norm; `sdd.convert` calls this on a converted `nn.Linear`."""
        self.parts = resolve_group(group, self.out_features)
        self._group: Group = group if group is None or isinstance(group, int) else self.parts
        self.shared_alpha, self.alpha_init, self.eps = shared_alpha, alpha_init, eps
        self.paper_draw = paper_draw
        alpha = new_alpha(self.weight, (alpha_size(self.parts, shared_alpha),), alpha_init)
        if scale:
            self.alpha = alpha
        else:
            self.register_buffer("alpha", alpha.detach(), persistent=False)

    @property
    def group(self) -> Group:
        """The norm groups as they were given; read-only, because alpha's size and `parts` follow from them."""
        return self._group

    @property
    def matrix(self) -> Tensor:
        """V as `[out_features, in_features]`; a subclass may store its weight another way."""
        return self.weight

    def reset_parameters(self) -> None:
        """Draw V and b as `nn.Linear` does, or as `sdd.convert` does if it made the layer; reset alpha."""
        if self.paper_draw:
            self.draw()
        else:
            nn.Linear.reset_parameters(self)  # pyright: ignore[reportArgumentType] (it needs weight and bias only)
        nn.init.constant_(self.alpha, self.alpha_init)

    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draw V as `sdd.convert` does, see `sdd.parameters.draw_`, and set b to zero; alpha stays."""
        draw_(self.weight, self.in_features, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `.half()`, `.to(...)` and the like; alpha stays at least float32."""
        return keep_wide(self, ("alpha",), lambda: super(SDDLinear, self)._apply(fn, recurse))

    def forward(self, input: Tensor, added: Tensor | None = None, alpha: Tensor | None = None) -> Tensor:
        """Compute `alpha * norm(V x + added) + b`; `[..., in_features]` to `[..., out_features]`.

        Args:
            input: x.
            added: an adapter's product, `[..., out_features]`; None for none.
            alpha: in the place of the layer's own; None for that.

        Returns:
            y in the dtype of `V x`.
        """
        z = F.linear(input, self.matrix)
        dtype, alpha = z.dtype, self.alpha if alpha is None else alpha
        z = z if added is None else z + added
        y = scaled_norm(z, alpha, self.bias, group=self.parts, eps=self.eps, dtype=dtype)
        probe_points.projection(self, z, y)
        return y

    def extra_repr(self) -> str:
        """The arguments of `nn.Linear`, then those of the norm that differ from the defaults."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self.group is not None:
            text += f", group={self.group}"
        if self.shared_alpha:
            text += ", shared_alpha=True"
        if "alpha" not in self._parameters:
            text += ", scale=False"
        return f"{text}, alpha_init={self.alpha_init:.4g}, eps={self.eps:g}"

    def _load_from_state_dict(  # the signature is torch's
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        widen(self, ("alpha",))
        key = prefix + "alpha"
        written_by_linear = local_metadata.get("version", 2) < 2  # without versions nobody knows
        if key in missing_keys and prefix + "weight" in state_dict and written_by_linear:
            missing_keys.remove(key)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; a layer from before `parts` was kept resolves its group anew."""
        super().__setstate__(state)
        if "parts" not in vars(self):
            self._group: Group = vars(self).pop("group", None)
            self.parts = resolve_group(self._group, self.out_features)


class RMSNorm(nn.Module):
    """Root-mean-square norm, `y = factor * weight * x / sqrt(mean(x^2) + eps)` (arXiv 1910.07467).

    The statistic and the scale are applied in at least float32 before the cast back to the dtype of the input, as in
    `SDDLinear`. (`torch.nn.RMSNorm` wants weight and input of one dtype.)

    Args:
        width: size of the scale: the number of features, or `group` for one scale shared by the groups.
        weight_init: initial value of the scale.
        eps: added to the mean square, inside the root.
        device: as in every module.
        group: width of the norm groups (heads); None for one group.
        scale: whether a scale is learned; without, `.weight` is None and left out of the formula.
        factor: a number that is not learned.

    Shapes:
        input and output `[..., features]`.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        width: int,
        weight_init: float = 1.0,
        eps: float = 1e-6,
        device: Device = None,
        *,
        group: int | None = None,
        scale: bool = True,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.width, self.group, self.weight_init, self.eps, self.factor = width, group, weight_init, eps, factor
        weight = nn.Parameter(torch.empty(width, device=device, dtype=torch.float32)) if scale else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; a norm from before `width` and `factor` were kept gets theirs."""
        super().__setstate__({"factor": 1.0, **state})
        if "width" not in vars(self) and self.weight is not None:
            self.width = len(self.weight)

    def reset_parameters(self) -> None:
        """Set the scale, if there is one, to `weight_init`."""
        if self.weight is not None:
            nn.init.constant_(self.weight, self.weight_init)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and scale; `[..., features]` to `[..., features]`."""
        if self.weight is None:
            return (self.factor * norm(x, self.eps, self.group)).to(x.dtype)
        weight = self.weight if self.factor == 1 else self.factor * self.weight
        return scaled_norm(x, weight, group=self.group, eps=self.eps)

    def extra_repr(self) -> str:
        """Width, initial scale and eps."""
        scale = "scale=False" if self.weight is None else f"weight_init={self.weight_init:.4g}"
        factor = "" if self.factor == 1 else f", factor={self.factor:.4g}"
        group = "" if self.group is None else f", group={self.group}"
        return f"{self.width}, {scale}, eps={self.eps:g}{group}{factor}"


class LearnedScale(nn.Module):
    """A learned scale of each feature, `s = weight * value / stored`; see `sdd.placement.Scale`.

    Args:
        width: number of features.
        value: s at first.
        stored: the parameter at first.
        device: as in every module.

    Shapes:
        output `[width]`.
    """

    def __init__(self, width: int, value: float, stored: float, device: Device = None) -> None:
        super().__init__()
        self.value, self.stored = value, stored
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameter to `stored`."""
        nn.init.constant_(self.weight, self.stored)

    def forward(self) -> Tensor:
        """The scale s, in at least float32."""
        return self.weight * (self.value / self.stored)

    def extra_repr(self) -> str:
        """Width and the two values."""
        return f"{len(self.weight)}, value={self.value:.4g}, stored={self.stored:.4g}"


class ExpertLinear(nn.Module):
    """A bias-free fully-connected layer for each expert of a mixture, `y = W_e x`, on rows sorted by expert.

    Args:
        n_experts: E.
        in_features: I.
        out_features: O.
        device: as in every module.
        dtype: of the weight, `[E, O, I]`: E weights of `nn.Linear`, stacked.

    Shapes:
        input `[M, I]`, output `[M, O]`.
    """

    def __init__(
        self,
        n_experts: int,
        in_features: int,
        out_features: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix as `nn.Linear` does."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def product(self, x_MI: Tensor, order: Order) -> Tensor:
        """`W_e x`, `[M, O]`."""
        return grouped_linear(x_MI, held(self.weight), order.ends_E)

    def forward(self, x_MI: Tensor, order: Order) -> Tensor:
        """`[M, I]` to `[M, O]`."""
        return self.product(x_MI, order)

    def extra_repr(self) -> str:
        """The shape of the weight."""
        E, O, I = self.weight.shape
        return f"n_experts={E}, in_features={I}, out_features={O}"


class SDDExpertLinear(ExpertLinear):
    """An SDD layer for each expert of a mixture, `y = alpha_e * norm(V_e x)`, on rows sorted by expert.

    Args:
        n_experts: E.
        in_features: I.
        out_features: O.
        device: as in every module.
        dtype: of the weight, `[E, O, I]`; alpha, `[E, O]`, is at least float32.
        alpha_init: initial value of every element of alpha.
        eps: added to the mean square, inside the root.

    Shapes:
        input `[M, I]`, output `[M, O]`.
    """

    def __init__(
        self,
        n_experts: int,
        in_features: int,
        out_features: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        alpha_init: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(n_experts, in_features, out_features, device, dtype)
        self.alpha_init, self.eps = alpha_init, eps
        self.alpha = new_alpha(self.weight, (n_experts, out_features), alpha_init)

    def reset_parameters(self) -> None:
        """Draw each matrix as `nn.Linear` does, and set alpha to `alpha_init`."""
        super().reset_parameters()
        if "alpha" in self._parameters:  # the first call comes before alpha exists
            nn.init.constant_(self.alpha, self.alpha_init)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `.half()`, `.to(...)` and the like; alpha stays at least float32."""
        return keep_wide(self, ("alpha",), lambda: super(SDDExpertLinear, self)._apply(fn, recurse))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        widen(self, ("alpha",))

    def forward(self, x_MI: Tensor, order: Order) -> Tensor:
        """`[M, I]` to `[M, O]`."""
        z = self.product(x_MI, order)
        y = self.scale(z, order)
        probe_points.projection(self, z, y)
        return y

    def scale(self, z_MO: Tensor, order: Order, weights_M: Tensor | None = None, eps: Eps | None = None) -> Tensor:
        """`alpha_e * norm(z)`, times each row's weight; with the layer's own eps unless another is given."""
        return expert_scaled_norm(z_MO, held(self.alpha), order, weights_M, eps=self.eps if eps is None else eps)

    def extra_repr(self) -> str:
        """The shape of the weight, and the arguments of the norm."""
        return f"{super().extra_repr()}, alpha_init={self.alpha_init:.4g}, eps={self.eps:g}"
