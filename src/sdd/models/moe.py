"""Dropless mixtures of experts: the feed-forward network of which each token uses only the k experts that suit it best.

With h the input, `p = softmax(R h)` over all E experts in float32, and the k experts of largest p chosen,

    y = sum over the chosen e of p_e * down_e(silu(gate_e h) * up_e h)

and a shared feed-forward network of h added by choice. No token is dropped and none is padded to a capacity: rows are
sorted by expert, so that memory and work grow with tokens * k. Norms at gate, up and ffn_out make each expert's
projections SDD layers of their own, `alpha_e * norm(V_e x)`: its output is normed before p_e is applied.

Two auxiliary losses join the training loss, each the mean over layers times its weight (arXiv 2409.02060):

    load balancing   E * sum over e of f_e * P_e   f_e: share of all choices that fell on e; P_e: mean of p_e
    router z-loss    mean of logsumexp(R h)^2

f and P are those of the tokens of one forward pass, over all processes (see `auxiliary_losses`).

Shape suffixes: B sequences, T tokens of each, N = B*T, K experts a token, M = N*K rows, E experts, C d_model, F d_ff,
L layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdd import functional as sdd_F
from sdd.models.config import ModelConfig, MoEConfig
from sdd.models.grouped import Order, collect, dispatch, grouped_linear, sort_by_expert
from sdd.placement import Norm, Site


class Routing(NamedTuple):
    """How a forward pass routed its tokens: by one layer, or with a first dimension L by each of a model's layers.

    A forward hook on `MoE` sees it as the second output. Nothing here waits for the device.

    Attributes:
        counts: int32 `[E]`, choices that fell on each expert; they add up to N*K.
        probability: float32 `[E]`, the mean of p over tokens.
        z_loss: float32, the mean of `logsumexp(R h)^2`.
        entropy: float32, the mean over tokens of p's entropy in nats: log E where the router has no preference.
    """

    counts: Tensor
    probability: Tensor
    z_loss: Tensor
    entropy: Tensor

    @property
    def load(self) -> Tensor:
        """float32 `[E]`: each expert's choices over their mean; 1 is balanced, 0 a dead expert, E/k all tokens."""
        return self.counts / self.counts.sum(-1, keepdim=True) * self.counts.shape[-1]

    @property
    def balance_loss(self) -> Tensor:
        """`E * sum of f_e * P_e`, 1 where all is balanced."""
        return (self.load * self.probability).sum(-1)


class ExpertLinear(nn.Module):
    """A bias-free fully-connected layer for each expert, `W_e x`, or with a norm SDD, `alpha_e * norm(V_e x)`.

    Args:
        n_experts: E.
        in_features: I.
        out_features: O.
        norm: what makes it an SDD layer; None for a plain one.
        n_layers: depth of the model, for the initial alpha.
        device: as in every module.

    Attributes:
        weight: `[E, O, I]`, as E weights of `torch.nn.Linear`.
        alpha: float32 `[E, O]`, or None.
    """

    alpha: nn.Parameter | None

    def __init__(
        self,
        n_experts: int,
        in_features: int,
        out_features: int,
        norm: Norm | None,
        n_layers: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features, device=device))
        self.alpha_init, self.eps = (1.0, 0.0) if norm is None else (norm.alpha(n_layers), norm.eps)
        # float32 whatever the default dtype: it is applied before the cast
        alpha = None if norm is None else torch.empty(n_experts, out_features, device=device, dtype=torch.float32)
        self.register_parameter("alpha", None if alpha is None else nn.Parameter(alpha))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix as `nn.Linear` does, and set alpha to its initial value."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.reset_alpha()

    def reset_alpha(self) -> None:
        """Set alpha to its initial value."""
        if self.alpha is not None:
            nn.init.constant_(self.alpha, self.alpha_init)

    def forward(self, x_MI: Tensor, order: Order) -> Tensor:
        """`[M, I]`, sorted by expert, to `[M, O]`."""
        return self.scale(self.product(x_MI, order), order)

    def product(self, x_MI: Tensor, order: Order) -> Tensor:
        """`z = V_e x`."""
        return grouped_linear(x_MI, self.weight, order.ends_E)

    def scale(self, z_MO: Tensor, order: Order) -> Tensor:
        """`alpha_e * norm(z)` in z's dtype; z itself of a plain layer."""
        if self.alpha is None:
            return z_MO
        return (sdd_F.norm(z_MO, self.eps) * self.alpha_rows(order)).to(z_MO.dtype)

    def alpha_rows(self, order: Order) -> Tensor:
        """The alpha of each row's expert, `[M, O]`: what a fused operation on rows takes."""
        assert self.alpha is not None
        return self.alpha.index_select(0, order.experts_M)

    def extra_repr(self) -> str:
        """Shape, and what the norm adds."""
        E, O, I = self.weight.shape
        text = f"n_experts={E}, in_features={I}, out_features={O}"
        return text if self.alpha is None else f"{text}, alpha_init={self.alpha_init:.4g}, eps={self.eps:g}"


class MoE(nn.Module):
    """A mixture of SwiGLU experts, see the module's equations.

    Args:
        config: the model; must have `moe`.
        norms: of the block, by site.
        shared: the feed-forward network that every token uses, if there is one.
        device: as in every module.
    """

    def __init__(
        self,
        config: ModelConfig,
        norms: dict[Site, Norm],
        shared: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        assert config.moe is not None
        E, C, F, L = config.moe.n_experts, config.d_model, config.d_ff, config.n_layers
        self.top_k, self.renormalise = config.moe.top_k, config.moe.renormalise
        self.joint = config.placement.joint_gate_up and {"gate", "up"} <= norms.keys()
        self.router = nn.Linear(C, E, bias=False, device=device)
        self.gate_proj = ExpertLinear(E, C, F, norms.get("gate"), L, device)
        self.up_proj = ExpertLinear(E, C, F, norms.get("up"), L, device)
        self.down_proj = ExpertLinear(E, F, C, norms.get("ffn_out"), L, device)
        self.shared = shared

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Routing]:
        """`[B, T, C]` to `[B, T, C]`, and how the tokens were routed."""
        x_NC = x_BTC.flatten(0, -2)
        weights_NK, order, routing = self.route(x_NC)
        y_MC = self.experts(dispatch(x_NC, order), order)
        weights_M = weights_NK.flatten().index_select(0, order.pairs_M)
        y_NC = collect(y_MC * weights_M.unsqueeze(1), order).to(y_MC.dtype)
        y_BTC = y_NC.view_as(x_BTC)
        return y_BTC if self.shared is None else y_BTC + self.shared(x_BTC), routing

    def route(self, x_NC: Tensor) -> tuple[Tensor, Order, Routing]:
        """The weights of each token's experts, at least float32 `[N, K]`; the order of the rows; statistics."""
        logits_NE = self.router(x_NC)
        logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        p_NE = logits_NE.softmax(-1)
        weights_NK, experts_NK = p_NE.topk(self.top_k)
        if self.renormalise:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        order = sort_by_expert(experts_NK, p_NE.shape[1])
        log_sum_N = logits_NE.logsumexp(-1)
        with torch.no_grad():
            entropy = (log_sum_N - torch.linalg.vecdot(p_NE, logits_NE)).mean()
        return weights_NK, order, Routing(order.counts_E, p_NE.mean(0), log_sum_N.square().mean(), entropy)

    def experts(self, x_MC: Tensor, order: Order) -> Tensor:
        """Each row through its expert: `[M, C]` to `[M, C]`."""
        z_gate, z_up = self.gate_proj.product(x_MC, order), self.up_proj.product(x_MC, order)
        if self.joint:
            n = sdd_F.norm(torch.cat([z_gate, z_up], -1), self.gate_proj.eps)
            alpha = torch.cat([self.gate_proj.alpha_rows(order), self.up_proj.alpha_rows(order)], -1)
            gate, up = (alpha * n).to(z_gate.dtype).chunk(2, -1)
        else:
            gate, up = self.gate_proj.scale(z_gate, order), self.up_proj.scale(z_up, order)
        return self.down_proj(sdd_F.swiglu(gate, up), order)


def auxiliary_losses(
    layers: Sequence[Routing], config: MoEConfig, sum_counts: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Routing]:
    """What the routers add to the training loss: `balance_loss * mean balance + router_z_loss * mean z`.

    The load balancing loss is linear in P, and f has no derivative. So where every process computes it with its own P
    and the counts of all, the mean over processes is the loss of all their tokens together, and so are the gradients.
    With gradient accumulation, each forward pass has the f of its own tokens.

    Args:
        layers: one for each layer.
        config: the weights.
        sum_counts: sums a tensor over the processes that train together; None for one process.

    Returns:
        The scalar, and the routing of all layers (first dimension L), detached, with the counts of all processes.
    """
    routing = Routing(*(torch.stack(values) for values in zip(*layers, strict=True)))
    if sum_counts is not None:
        routing = routing._replace(counts=sum_counts(routing.counts))
    total = config.balance_loss * routing.balance_loss.mean() + config.router_z_loss * routing.z_loss.mean()
    return total, Routing(*(value.detach() for value in routing))
