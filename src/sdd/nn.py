"""`SDDLinear`, the drop-in fully-connected layer, `RMSNorm`, the plain norm of the other sites, and layers of experts.

`SDDExpertLinear` holds one SDD layer an expert of a mixture, stacked.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd import probe_points
from sdd.functional import Eps, Group, alpha_size, resolve_group
from sdd.kernels import scaled_norm
from sdd.kernels.experts import Order, expert_scaled_norm, grouped_linear


class SDDLinear(nn.Linear):
    """A fully-connected layer with Scale-Distribution Decoupling, `y = alpha * norm(V x) + b`.

    A subclass of `torch.nn.Linear` with its signature: `.weight` is V, `.bias` is b, and `.alpha` is added.
    `norm(z) = z / sqrt(mean(z^2) + eps)` is taken over the output features of each token, or over groups of them.
    Statistics are float32 (float64 for float64 input), alpha is applied in float32 before the cast back to the dtype
    of `V x`, and the bias comes after the scale.

    The forward pass does not see the scale of V (up to eps): the initial std of V only sets how fast an optimiser
    step turns it.

    A state dict of an `nn.Linear` of the same shape loads into it (strictly): V and b are taken from it, alpha keeps
    its present value. A state dict that an `SDDLinear` wrote must hold alpha.

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

    Shapes:
        input `[..., in_features]`, output `[..., out_features]`, alpha `[out_features]` for one group.

    Raises:
        ValueError: if `group` does not fit `out_features`.

    Source: arXiv 2502.15499.
    """

    # marks state dicts that must hold alpha; those of nn.Linear carry version 1
    _version = 2

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group = None,
        shared_alpha: bool = False,
        alpha_init: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        parts = resolve_group(group, out_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.group: Group = group if group is None or isinstance(group, int) else parts
        self.shared_alpha = shared_alpha
        self.alpha_init = alpha_init
        self.eps = eps
        alpha_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.alpha = nn.Parameter(torch.empty(alpha_size(parts, shared_alpha), device=device, dtype=alpha_dtype))
        nn.init.constant_(self.alpha, alpha_init)

    def reset_parameters(self) -> None:
        """Draw V and b as `nn.Linear` does and set alpha to `alpha_init`."""
        super().reset_parameters()
        if "alpha" in self._parameters:  # nn.Linear.__init__ calls this before alpha exists
            nn.init.constant_(self.alpha, self.alpha_init)

    def forward(self, input: Tensor) -> Tensor:
        """Compute `alpha * norm(V x) + b`; `[..., in_features]` to `[..., out_features]`."""
        z = F.linear(input, self.weight)
        y = scaled_norm(z, self.alpha, self.bias, group=self.group, eps=self.eps)
        probe_points.projection(self, z, y)
        return y

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, after those of `nn.Linear`."""
        text = super().extra_repr()
        if self.group is not None:
            text += f", group={self.group}"
        if self.shared_alpha:
            text += ", shared_alpha=True"
        return f"{text}, alpha_init={self.alpha_init:.4g}, eps={self.eps:g}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "alpha"
        written_by_sdd = local_metadata.get("version", 1) >= 2
        if key in missing_keys and prefix + "weight" in state_dict and not written_by_sdd:
            missing_keys.remove(key)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, `y = weight * x / sqrt(mean(x^2) + eps)` (arXiv 1910.07467).

    The statistic and the scale are applied in at least float32 before the cast back to the dtype of the input, as in
    `SDDLinear`. (`torch.nn.RMSNorm` wants weight and input of one dtype.)

    Args:
        width: size of the scale: the number of features, or `group` for one scale shared by the groups.
        weight_init: initial value of the scale.
        eps: added to the mean square, inside the root.
        device: as in every module.
        group: width of the norm groups (heads); None for one group.

    Shapes:
        input and output `[..., features]`.
    """

    def __init__(
        self,
        width: int,
        weight_init: float = 1.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        *,
        group: int | None = None,
        scale: bool = True,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        assert scale
        self.factor = factor
        self.group, self.weight_init, self.eps = group, weight_init, eps
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to `weight_init`."""
        nn.init.constant_(self.weight, self.weight_init)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and scale; `[..., features]` to `[..., features]`."""
        return scaled_norm(x, self.weight, group=self.group, eps=self.eps)

    def extra_repr(self) -> str:
        """Width, initial scale and eps."""
        return f"{self.weight.shape[0]}, weight_init={self.weight_init:.4g}, eps={self.eps:g}"


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
        device: torch.device | str | None = None,
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
        return grouped_linear(x_MI, self.weight, order.ends_E)

    def forward(self, x_MI: Tensor, order: Order) -> Tensor:
        """`[M, I]` to `[M, O]`."""
        return self.product(x_MI, order)

    def extra_repr(self) -> str:
        """Its shape."""
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha_init: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(n_experts, in_features, out_features, device, dtype)
        self.alpha_init, self.eps = alpha_init, eps
        alpha_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.alpha = nn.Parameter(torch.empty(n_experts, out_features, device=device, dtype=alpha_dtype))
        nn.init.constant_(self.alpha, alpha_init)

    def reset_parameters(self) -> None:
        """Draw each matrix as `nn.Linear` does and set alpha to `alpha_init`."""
        super().reset_parameters()
        if "alpha" in self._parameters:  # the first call comes before alpha exists
            nn.init.constant_(self.alpha, self.alpha_init)

    def forward(self, x_MI: Tensor, order: Order) -> Tensor:
        """`[M, I]` to `[M, O]`."""
        z = self.product(x_MI, order)
        y = self.scale(z, order)
        probe_points.projection(self, z, y)
        return y

    def scale(self, z_MO: Tensor, order: Order, eps: Eps | None = None) -> Tensor:
        """`alpha_e * norm(z)`; with another eps if one is given."""
        return expert_scaled_norm(z_MO, self.alpha, order, eps=self.eps if eps is None else eps)

    def extra_repr(self) -> str:
        """The shape, and the arguments of the norm."""
        return f"{super().extra_repr()}, alpha_init={self.alpha_init:.4g}, eps={self.eps:g}"
