"""The computation of a run: model, optimiser and batches, the gradients of a step and the held-out loss."""

from dataclasses import replace

import torch
from torch import Tensor

from sdd.data import DataSource, Loader, eval_windows
from sdd.errors import UserError
from sdd.models import LanguageModel
from sdd.models.moe import Routing
from sdd.models.transformer import HAS_CHUNKED_LOSS, TrainingLoss
from sdd.parallel.experts import exchange_of
from sdd.parallel.ring import check_ring
from sdd.train.config import RunConfig, resolve
from sdd.train.evaluate import Evaluation, evaluate
from sdd.train.optim import build_optimizer, set_learning_rate
from sdd.train.parallel import World, pick_autocast, pick_device
from sdd.train.router_stats import RouterStats
from sdd.train.schedule import learning_rate
from sdd.train.sharding import average_gradients, build_model, compile_model
from sdd.train.weights import WeightRule


class Learner:
    """The model of a run with its data and optimiser: gradients, updates and held-out loss. It writes no files.

    Args:
        config: the run. Where `compile` is still "auto" (see `sdd.train.compiling`), nothing is compiled.
        world: the processes that share the run.

    Attributes:
        device: where it computes.
        autocast_dtype: bfloat16, or None for float32 throughout.
        data, loader, model, optimizer, weight_rule: the parts.
        router_stats: how the last step's tokens were routed; None without experts.
        objective: what the last step minimised, z-loss and auxiliary losses included; None without z-loss.
        eval_windows: held-out tokens, int64 `[N, T + 1]`.
        token_bytes: int `[vocab_size]`, bytes of UTF-8 each token stands for; None if unknown.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        if config.compile == "auto":
            config = replace(config, compile=False)
        self.device = world.together(lambda: world.place(pick_device(config.device)))
        world = world.laid_out(config.parallel, config.model, self.device)
        self.config, self.world = config, world
        self.autocast_dtype = world.together(lambda: pick_autocast(config.precision, self.device))
        world.together(lambda: check_ring(config.parallel, config.model, self.device, self.autocast_dtype))
        if config.threads:
            torch.set_num_threads(config.threads)
        self.data = world.in_turn(lambda: resolve(config))
        self.loader = world.together(lambda: _build_loader(config, self.data, world))
        if len(set(world.gather(self.data.fingerprint()))) > 1:
            raise UserError("the processes do not see the same training data: give every machine the same files")
        torch.manual_seed(config.seed)
        self.model = build_model(LanguageModel(config.model, "meta"), self.device, self.autocast_dtype, world)
        self.model.checkpoint_blocks = config.activation_checkpointing
        self.model.chunked_loss = config.chunked_loss and HAS_CHUNKED_LOSS
        self.model.sum_counts = world.total_of_all if world.size > 1 else None
        self.optimizer = build_optimizer(self.model, config.optim)
        self.weight_rule = WeightRule(self.model, self.optimizer, config.weight_rule)
        self.router_stats: RouterStats | None = None
        self.objective: Tensor | None = None
        self.eval_windows = eval_windows(self.data.validation, config.eval_sequences, config.model.context)
        self._passes = world.passes(config.data.batch_size, config.accumulate)
        tokenizer = self.data.tokenizer
        self.token_bytes = None if tokenizer is None else tokenizer.token_bytes(config.model.vocab_size)
        self._document_eos = self.data.eos if config.data.document_mask else None
        if config.compile:
            compile_model(self.model)

    def warm_up(self) -> None:
        """Compute the gradients of the first part of the data and drop them, so that a model is compiled by then."""
        self._loss(self._batch(0).chunk(self._passes)[0]).total.backward()
        self.optimizer.zero_grad()

    def draw_weights(self) -> None:
        """Draw the initial weights from the seed, and clear the optimiser's state."""
        torch.manual_seed(self.config.seed)
        self.model.init_weights()
        self.optimizer.state.clear()

    def backward(self, step: int) -> Tensor:
        """Forward and backward passes of one step (from 0), at its learning rate. The gradients are not yet clipped.

        Returns:
            Cross-entropy of the whole batch in nats a token, without z-loss and the auxiliary losses of a mixture of
            experts; still on the device, and the same on every process.
        """
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, step + 1, self.config.steps))
        parts = self._batch(step).chunk(self._passes)
        total, objective = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        passes: list[Routing] = []
        exchange = exchange_of(self.model)
        if exchange is not None:
            exchange.sent_bytes = 0
        for part in parts:
            loss = self._loss(part)
            (loss.total / len(parts)).backward()
            total += loss.cross_entropy / len(parts)
            objective += loss.total.detach() / len(parts)
            if loss.routing is not None:
                passes.append(loss.routing)
        average_gradients(self.model, self.world)
        self.router_stats = None
        if passes:
            self.router_stats = RouterStats(passes, self.world, None if exchange is None else exchange.sent_bytes)
        self.objective = self.world.mean(objective) if self.config.optim.z_loss else None
        return self.world.mean(total)

    def update(self) -> None:
        """Let the optimiser use the gradients, and drop them."""
        self.weight_rule.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> Evaluation:
        """Held-out loss on the run's fixed windows."""
        return evaluate(
            self.model,
            self.eval_windows,
            self.config.data.batch_size // (self.world.data_size * self._passes),
            token_bytes=self.token_bytes,
            document_eos=self._document_eos,
            autocast_dtype=self.autocast_dtype,
            world=self.world,
        )

    @property
    def precision(self) -> str:
        """The dtype of the matrix products."""
        return str(self.autocast_dtype or torch.float32).removeprefix("torch.")

    def _loss(self, tokens: Tensor) -> TrainingLoss:
        """The loss of some rows of a batch."""
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.model(
                tokens[:, :-1],
                tokens[:, 1:],
                document_eos=self._document_eos,
                z_loss=self.config.optim.z_loss,
                detailed=True,
            )

    def _batch(self, step: int) -> Tensor:
        """This process's rows of a batch, on the device."""
        batch = self.world.alone(lambda: self.loader.batch(step))
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)


def _build_loader(config: RunConfig, data: DataSource, world: World) -> Loader:
    """The batches of a run.

    Raises:
        UserError: if the config does not fit the data.
    """
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is too small: the data have {data.vocab_size} tokens"
        )
    if config.data.document_mask and data.eos is None:
        raise UserError("data.document_mask=true needs to know the end-of-document token, and these data name none")
    batch_size, context = config.data.batch_size, config.model.context
    return Loader(data.parts, batch_size, context, config.seed, rank=world.data_rank, world_size=world.data_size)
