"""Memory of one GPU while `sdd train` runs, by part.

Of P parameters, P_m stand in the blocks' matrices, P_e in embedding and head, P_s in alphas and norm weights. On N GPUs
FSDP2 gives each 1/N of the matrices, embedding and head; alphas and norm weights are whole everywhere. So a GPU has
p = (P_m + P_e)/N + P_s parameters. In bytes:

    weights      4 p, float32
    moments      8 p, AdamW's two in float32, and a step counter of 4 for each tensor; 4 p of what Muon moves, which
                 keeps one and no counter
    gradients    4 p, float32
    copies       weights as matrix products read them: on 1 GPU as measured, which is autocast's bfloat16. On N GPUs
                 embedding and head are gathered in float32, and two blocks' matrices in the precision of autocast
    activations  kept for the backward pass, measured (`sdd.plan.measure`)
    loss, block  the most that is held on top of these while the loss and its gradient are computed, and before and
                 after that; measured. Gradients of weights on the way to where they are kept belong to it

Loss and block are never held at the same time, so the peak counts only the larger of them.
"""

from dataclasses import asdict, dataclass, replace

from sdd.models import count_parameters
from sdd.plan.measure import MemoryCase, measure_pass
from sdd.plan.optimizer import optimizer_cost


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part; see the module's table.

    Attributes:
        weights, moments, gradients: of the optimiser, float32.
        copies: of weights, as matrix products read them.
        activations: kept for the backward pass.
        loss: the most on top of these while the loss and its gradient are computed.
        block: the most on top of these before and after that.
    """

    weights: int
    moments: int
    gradients: int
    copies: int
    activations: int
    loss: int
    block: int

    @property
    def states(self) -> int:
        """Bytes that stay from step to step: weights, moments, and between micro-batches gradients."""
        return self.weights + self.moments + self.gradients

    @property
    def peak(self) -> int:
        """The most at once."""
        return self.states + self.copies + self.activations + max(self.loss, self.block)

    def to_dict(self) -> dict[str, int]:
        """All parts and the peak, for JSON."""
        return asdict(self) | {"peak": self.peak}


def measure_memory(case: MemoryCase) -> Memory:
    """Measure the memory of one GPU by part.

    Raises:
        UserError: if a tensor has more bytes than 64 bits can count.
    """
    parameters = count_parameters(case.model)
    ends = parameters.embedding + parameters.head
    share = -(-(parameters.matrices + ends) // case.gpus) + parameters.scales
    found = measure_pass(case)
    held = found.activations + found.copies
    return Memory(
        weights=4 * share,
        moments=optimizer_cost(case, share).state,
        gradients=4 * share,
        copies=found.copies + (_gathered(case, parameters.matrices, ends) if case.gpus > 1 else 0),
        activations=found.activations,
        loss=max(0, found.loss_forward - held, found.loss_backward - held),
        block=max(0, max(found.blocks_forward, found.blocks_backward, found.embedding_backward) - held),
    )


def _gathered(case: MemoryCase, matrices: int, ends: int) -> int:
    """Weights that FSDP2 has gathered: embedding, head, and two blocks, since one computes while the next comes."""
    blocks = min(2, case.model.n_layers) * matrices // case.model.n_layers
    return 4 * ends + (2 if case.bfloat16 else 4) * blocks


def bare_activations(case: MemoryCase) -> int:
    """Bytes of activations that the model would keep without any norm."""
    bare = replace(case.model.placement, norms={}, joint_gate_up=False, overrides={})
    return measure_pass(case.with_model(placement=bare)).activations
