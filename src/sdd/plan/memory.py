"""Memory of one GPU while `sdd train` runs, by part.

Of P parameters, P_m stand in the blocks' matrices, P_e in embedding and head, P_s in alphas and norm weights. On N GPUs
FSDP2 gives each 1/N of the matrices, embedding and head; alphas and norm weights are whole everywhere. So a GPU has
p = (P_m + P_e)/N + P_s parameters. H is the size of the head, w is 2 under bfloat16 autocast and else 4. In bytes:

    weights      4 p, float32
    moments      8 p, AdamW's two in float32, and a step counter of 4 for each tensor
    gradients    4 p, float32
    copies       of weights as matrix products read them. 1 GPU: autocast's 2 P_m in bfloat16 (recomputed blocks let go
                 of theirs after the forward pass). N GPUs: 4 P_e and two blocks' matrices gathered, w a parameter
    activations  what the derivatives need, `sdd.plan.activations`, for the tokens of a micro-batch
    loss         logits, their gradient, and the head's copy (2 H) and gradient; the chunked loss computes the latter in
                 the forward pass, 4 H, and hands on a copy
    block        what one block recomputes, its gradients on the way to where they are kept, and the gradient of a tied
                 or sharded head, 4 H, which waits for the embedding's

Parts that are never there together do not add up: the peak counts the larger of loss and block.
"""

from dataclasses import asdict, dataclass, replace

from sdd.models import LanguageModel, ModelConfig, count_parameters
from sdd.models.block import eliminations
from sdd.plan.activations import count_activations
from sdd.train import RunConfig


@dataclass(frozen=True)
class Job:
    """What memory depends on.

    Attributes:
        model: shape, placement, and the length of a sequence.
        gpus: number of GPUs, N.
        micro_batch: sequences that one GPU has in memory at once.
        bfloat16: autocast; else float32.
        checkpoint_blocks: recompute each block in the backward pass.
        chunked_loss: never hold all logits.
        z_loss: the loss has that term, so the logits are kept.
        document_mask: attention gets a mask.
    """

    model: ModelConfig
    gpus: int = 1
    micro_batch: int = 1
    bfloat16: bool = True
    checkpoint_blocks: bool = False
    chunked_loss: bool = False
    z_loss: bool = False
    document_mask: bool = False

    @classmethod
    def of(cls, run: RunConfig, gpus: int, micro_batch: int) -> "Job":
        """The job that a run is on GPUs, where precision "auto" is bfloat16."""
        return cls(
            run.model,
            gpus,
            micro_batch,
            bfloat16=run.precision != "float32",
            checkpoint_blocks=run.activation_checkpointing,
            chunked_loss=run.chunked_loss,
            z_loss=run.optim.z_loss > 0,
            document_mask=run.data.document_mask,
        )

    @property
    def tokens(self) -> int:
        """Tokens that one GPU has in memory at once."""
        return self.micro_batch * self.model.context

    @property
    def itemsize(self) -> int:
        """Bytes of what matrix products read and write, w."""
        return 2 if self.bfloat16 else 4

    @property
    def gradient_size(self) -> int:
        """Bytes an element of a matrix's gradient: as computed, and cast to float32 if that is another precision."""
        return 6 if self.bfloat16 else 4

    @property
    def has_kernels(self) -> bool:
        """Whether norms run as fused kernels: on every GPU that Triton knows."""
        return True

    @property
    def has_fused_attention(self) -> bool:
        """Whether torch has a fused kernel on GPUs: with grouped heads only its flash kernel, bfloat16 and no mask."""
        grouped = self.model.n_kv_heads != self.model.n_heads
        return not grouped or (self.bfloat16 and not self.document_mask)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part; see the module's table.

    Attributes:
        weights, moments, gradients: AdamW's, float32.
        copies: of weights, as the matrix products read them.
        activations: kept for the backward pass when the model's forward pass ends.
        loss: on top, at most, while the loss and its gradient are computed.
        block: on top, at most, while the gradients of the blocks are computed.
        norms: what norms keep of the activations.
    """

    weights: int
    moments: int
    gradients: int
    copies: int
    activations: int
    loss: int
    block: int
    norms: int

    @property
    def states(self) -> int:
        """What stays from step to step: weights, moments, and between micro-batches gradients."""
        return self.weights + self.moments + self.gradients

    @property
    def peak(self) -> int:
        """The most at once."""
        return self.states + self.copies + self.activations + max(self.loss, self.block)

    def to_dict(self) -> dict[str, int]:
        """All of it, for JSON."""
        return asdict(self) | {"peak": self.peak}


@dataclass(frozen=True)
class _Sizes:
    """Parameters by role: all blocks' matrices, the largest of them, embedding and head together, and the head."""

    matrices: int
    largest: int
    ends: int
    head: int


def count_memory(job: Job) -> Memory:
    """The memory of one GPU by part."""
    model = job.model
    count = count_parameters(model)
    experts = 1 if model.moe is None else model.moe.n_experts
    sizes = _Sizes(
        count.matrices,
        model.d_model * max(model.d_ff * experts, model.d_model),
        count.embedding + count.head,
        model.vocab_size * model.d_model,
    )
    share = -(-(sizes.matrices + sizes.ends) // job.gpus) + count.scales
    tensors = len(list(LanguageModel(model, device="meta").parameters()))
    activations = count_activations(
        model,
        bfloat16=job.bfloat16,
        checkpoint_blocks=job.checkpoint_blocks,
        chunked_loss=job.chunked_loss,
        z_loss=job.z_loss,
        fused_attention=job.has_fused_attention,
        kernels=job.has_kernels,
    )
    return Memory(
        weights=4 * share,
        moments=8 * share + 4 * tensors,
        gradients=4 * share,
        copies=_copies(job, sizes),
        activations=round(activations.kept * job.tokens),
        loss=_loss(job, sizes, round(activations.loss * job.tokens)),
        block=max(0, round(activations.block * job.tokens) + _block(job, sizes)),
        norms=round(activations.parts.get("norms", 0) * job.tokens),
    )


def _copies(job: Job, sizes: _Sizes) -> int:
    """Weights as the matrix products read them, from the forward pass to the backward pass."""
    if job.gpus > 1:
        # one block computes while the next is gathered
        blocks = min(2, job.model.n_layers) * sizes.matrices // job.model.n_layers
        return 4 * sizes.ends + job.itemsize * blocks
    if job.checkpoint_blocks:
        return 0
    return 2 * sizes.matrices if job.bfloat16 else 4 * _with_gain(job.model)


def _with_gain(model: ModelConfig) -> int:
    """Parameters of matrices that take up the alpha of a norm before them that is left out."""
    C, KV, F = model.d_model, model.kv_width, model.d_ff
    readers: dict[str, int] = {"attn_in": C * (C + 2 * KV), "ctx": C * C, "ffn_in": 2 * C * F}
    return sum(readers.get(site, 0) for layer in range(model.n_layers) for site in eliminations(model, layer))


def _loss(job: Job, sizes: _Sizes, backward: int) -> int:
    """From the end of the forward pass until the head's gradient is there; `backward` is the loss's own."""
    if job.chunked_loss:  # no product for autocast: it reads the float32 head
        return backward + 8 * sizes.head
    logits = job.model.vocab_size * job.tokens
    cast = 2 * sizes.head if job.bfloat16 else 0
    # until the forward pass ends autocast holds all that it cast
    forward = 8 * logits + (2 * sizes.matrices if job.gpus == 1 and job.bfloat16 and job.checkpoint_blocks else 0)
    product = job.itemsize * logits + job.gradient_size * sizes.head
    return cast + max(forward, backward, product)


def _block(job: Job, sizes: _Sizes) -> int:
    """Weights and gradients of one block in the backward pass, and what waits beside them."""
    block = sizes.matrices // job.model.n_layers
    if job.gpus > 1:  # one block's as computed, and the last one's in float32 while it is reduced
        return 4 * sizes.head + (job.itemsize + 4) * block
    copies = 2 * block if job.bfloat16 and job.checkpoint_blocks else 0
    return (4 * sizes.head if job.model.tie_embeddings else 0) + copies + job.gradient_size * sizes.largest


def alternatives(job: Job) -> list[tuple[Job, Memory]]:
    """The same job with and without activation checkpointing and the chunked loss."""
    return [
        (other, count_memory(other))
        for checkpoint in (False, True)
        for chunked in (False, True)
        if not (chunked and job.z_loss)
        for other in [replace(job, checkpoint_blocks=checkpoint, chunked_loss=chunked)]
    ]
