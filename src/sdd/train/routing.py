"""How a step's tokens were routed, for metrics.jsonl.

balance_loss      mean over layers of `E * sum of f_e * P_e`, 1 where balanced; before its weight
router_z_loss     mean over layers of `mean of logsumexp^2`; before its weight
router_entropy    mean over tokens and layers of the entropy of the router's softmax, in nats; at most log E
worst_load        the most tokens on an expert over the mean, in the worst layer; at most E/k
dead_experts      experts that no token of the step chose, over all layers
routing           entropy, worst_load and dead_experts by layer
expert_load       by layer and expert, tokens over the mean (in rows of evaluations, of the step just done)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdd.models.moe import Routing
from sdd.train.parallel import World


class StepRouting:
    """The routing of all tokens of a step, on the device until it is asked for.

    Args:
        passes: of each forward pass: counts of all processes, the rest of this one.
        world: the processes; all must make one.
    """

    def __init__(self, passes: Sequence[Routing], world: World) -> None:
        parts = [torch.stack([part.balance_loss, part.z_loss, part.entropy]) for part in passes]
        means = world.mean(torch.stack(parts).mean(0))
        self._values = torch.cat([means, torch.stack([part.counts for part in passes]).sum(0).T.to(means.dtype)])
        self._host: Tensor | None = None

    def row(self) -> dict[str, Any]:
        """The columns of a step."""
        balance, z_loss, entropy = self._read()[:3]
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
        counts = self._read()[3:].T
        return counts / counts.mean(1, keepdim=True)

    def _read(self) -> Tensor:
        if self._host is None:
            self._host = self._values.cpu()
        return self._host


def _short(values: Tensor) -> Any:
    """Nested lists with three decimals: a row of many layers stays small."""
    return [_short(row) for row in values] if values.ndim > 1 else [round(value, 3) for value in values.tolist()]
