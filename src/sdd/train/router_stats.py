"""How the routers of a mixture of experts spread a step's tokens, as columns of metrics.jsonl.

balance_loss      mean over layers of `E * sum of f_e * P_e`, 1 where balanced; before its weight
router_z_loss     mean over layers of `mean of logsumexp^2`; before its weight
router_entropy    mean over tokens and layers of the entropy of the router's softmax, in nats; at most log E
worst_load        the most tokens on one expert over the mean, in the worst layer; at most E/k
dead_experts      number of experts that no token of the step chose, over all layers
routing           entropy, worst_load and dead_experts by layer
expert_load       tokens over the mean, by layer and expert (in rows of evaluations, of the step before)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdd.models.moe import Routing
from sdd.train.parallel import World


class RouterStats:
    """Statistics of the routing of all tokens of a step, kept on the device until they are asked for.

    Args:
        passes: the routing of each forward pass. Its counts cover all processes, the rest those of its own rows.
        world: the processes; all of them must create their `RouterStats` at the same point.
    """

    def __init__(self, passes: Sequence[Routing], world: World) -> None:
        means = [torch.stack([each.balance_loss, each.z_loss, each.entropy]) for each in passes]
        self._means: Tensor = world.mean(torch.stack(means).mean(0))
        self._counts = torch.stack([each.counts for each in passes]).sum(0)

    def row(self) -> dict[str, Any]:
        """The columns of a step."""
        balance, z_loss, entropy = self._means.cpu()
        load = self._load()
        worst, dead = load.amax(1), (load == 0).sum(1)
        return {
            "balance_loss": balance.mean().item(),
            "router_z_loss": z_loss.mean().item(),
            "router_entropy": entropy.mean().item(),
            "worst_load": worst.max().item(),
            "dead_experts": int(dead.sum()),
            "routing": {"entropy": _short(entropy), "worst_load": _short(worst), "dead_experts": dead.tolist()},
        }

    def loads(self) -> dict[str, Any]:
        """The column of an evaluation."""
        return {"expert_load": _short(self._load())}

    def _load(self) -> Tensor:
        """Tokens of each expert over the mean of its layer, [layers, experts]."""
        counts = self._counts.cpu().to(self._means.dtype)
        return counts / counts.mean(1, keepdim=True)


def _short(values: Tensor) -> Any:
    """Nested lists with three decimals: a row of many layers stays small."""
    return [_short(row) for row in values] if values.ndim > 1 else [round(value, 3) for value in values.tolist()]
