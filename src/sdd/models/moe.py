"""Dropless mixtures of experts: a feed-forward network of which each token uses only the k experts that fit it best.

With h the input, `p = softmax(R h)` over all E experts in float32, and the k experts of largest p chosen,

    y = sum over the chosen e of p_e * down_e(silu(gate_e h) * up_e h)

plus, by choice, a shared feed-forward network of h. No token is dropped and none is padded to a capacity: rows are
sorted by expert, so memory and work grow with tokens * k. Norms at gate, up and ffn_out make each expert's projections
SDD layers of their own, `alpha_e * norm(V_e x)`: an expert's output is normed before p_e is applied.

Two auxiliary losses join the training loss, each the mean over layers times its weight (arXiv 2409.02060):

    load balancing loss   E * sum over e of f_e * P_e   f_e: share of all choices that fell on e; P_e: mean of p_e
    router z-loss         mean of logsumexp(R h)^2

f and P are those of the tokens of one forward pass, over all processes (see `auxiliary_losses`).

Shape suffixes: B sequences, T tokens of each, N = B*T, K experts a token, M = N*K rows, E experts, C d_model, F d_ff,
L layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sdd import probe_points
from sdd.functional import cast_once, swiglu
from sdd.kernels import expert_scaled_norm
from sdd.kernels.experts import Order, by_row, collect, dispatch, sort_by_expert
from sdd.models.config import ModelConfig, MoEConfig
from sdd.models.joint import call_jointly
from sdd.models.sites import experts_at
from sdd.nn import SDDExpertLinear
from sdd.placement import Norm, Site


class Routing(NamedTuple):
    """How one layer routed the tokens of a forward pass; with a first dimension L, how each layer of a model did.

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
        C, F = config.d_model, config.d_ff
        self.top_k, self.renormalise = config.moe.top_k, config.moe.renormalise
        self.joint = config.placement.joins_gate_up(norms)
        self.router = nn.Linear(C, config.moe.n_experts, bias=False, device=device)
        self.gate_proj = experts_at(C, F, norms.get("gate"), config, device)
        self.up_proj = experts_at(C, F, norms.get("up"), config, device)
        self.down_proj = experts_at(F, C, norms.get("ffn_out"), config, device)
        self.shared = shared

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Routing]:
        """`[B, T, C]` to `[B, T, C]`, and how the tokens were routed."""
        x_BTC = cast_once(x_BTC)
        x_NC = x_BTC.flatten(0, -2)
        weights_NK, order, routing = self.route(x_NC)
        y_BTC = self.combine(self.experts(dispatch(x_NC, order), order), weights_NK, order).view_as(x_BTC)
        return (y_BTC if self.shared is None else y_BTC + self.shared(x_BTC)), routing

    def route(self, x_NC: Tensor) -> tuple[Tensor, Order, Routing]:
        """The weights of each token's experts, at least float32 `[N, K]`; the order of the rows; statistics."""
        logits_NE = self.router(x_NC)
        logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        log_p_NE = logits_NE.log_softmax(-1)
        p_NE = log_p_NE.exp()
        weights_NK, experts_NK = p_NE.topk(self.top_k)
        if self.renormalise:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        order = sort_by_expert(experts_NK, p_NE.shape[1])
        # log p_e = (R h)_e - logsumexp(R h) for every e: the first one gives the logsumexp without another pass
        log_sum_N = logits_NE[:, 0] - log_p_NE[:, 0]
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(p_NE, log_p_NE).mean()
        return weights_NK, order, Routing(order.counts_E, p_NE.mean(0), log_sum_N.square().mean(), entropy)

    def experts(self, x_MC: Tensor, order: Order) -> Tensor:
        """Each row through its expert: `[M, C]` to `[M, C]`."""
        gate_and_up = self._joint if self.joint else self._separate
        return self.down_proj(swiglu(*gate_and_up(x_MC, order)), order)

    def combine(self, y_MC: Tensor, weights_NK: Tensor, order: Order) -> Tensor:
        """The sum of each token's experts with their weights: `[M, C]` to `[N, C]`, in the dtype of y."""
        return collect(y_MC * by_row(weights_NK, order).unsqueeze(1), order).to(y_MC.dtype)

    def _separate(self, x_MC: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        return self.gate_proj(x_MC, order), self.up_proj(x_MC, order)

    def _joint(self, x_MC: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        """Gate and up with one norm over the concatenated vector (the released dense code)."""
        gate, up = cast(SDDExpertLinear, self.gate_proj), cast(SDDExpertLinear, self.up_proj)

        def compute(x_gate: Tensor, x_up: Tensor) -> tuple[Tensor, Tensor]:
            z_M2F = torch.cat([gate.product(x_gate, order), up.product(x_up, order)], -1)
            alpha_E2F = torch.cat([gate.alpha, up.alpha], -1)
            y_gate, y_up = expert_scaled_norm(z_M2F, alpha_E2F, order, eps=gate.eps).chunk(2, -1)
            probe_points.projection(gate, z_M2F, y_gate)
            probe_points.projection(up, z_M2F, y_up)
            return y_gate, y_up

        return call_jointly(gate, up, SDDExpertLinear, compute, x_MC, order)


def auxiliary_losses(
    layers: Sequence[Routing],
    config: MoEConfig,
    sum_counts: Callable[[Tensor], Tensor] | None = None,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Routing]:
    """The routers' part of the training loss, `balance_loss * mean balance + router_z_loss * mean z`.

    The load balancing loss is linear in P, and f has no derivative. So where every process computes it with its own P
    and the counts of all, the mean over processes is the loss of all their tokens together, and so are the gradients.
    With gradient accumulation, each forward pass has the f of its own tokens.

    Args:
        layers: one for each layer.
        config: the weights.
        sum_counts: sums a tensor over the processes that train together; None for one process.
        mean: the mean, with gradient, over the processes that have parts of the same sequences; None for one process.

    Returns:
        The scalar, and the routing of all layers (first dimension L), detached, with the counts of all processes.
    """
    routing = Routing(*(torch.stack(values) for values in zip(*layers, strict=True)))
    if sum_counts is not None:
        routing = routing._replace(counts=sum_counts(routing.counts))
    if mean is not None:
        routing = Routing(routing.counts, *(mean(value) for value in routing[1:]))
    total = config.balance_loss * routing.balance_loss.mean() + config.router_z_loss * routing.z_loss.mean()
    return total, Routing(*(value.detach() for value in routing))
