"""What a run says in words: its first lines, and the text that its model writes at the end."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from sdd.models import count_parameters, generate
from sdd.models.transformer import HAS_CHUNKED_LOSS
from sdd.train.sharding import gathered

if TYPE_CHECKING:
    from sdd.train.trainer import Trainer


def opening(run: "Trainer") -> Iterator[str]:
    """Lines that say what is trained on what, where and how long."""
    config, model = run.config, run.config.model
    count = count_parameters(model)
    yield (
        f"{model.placement.name or 'own placement'}: {model.n_layers} layers, d_model {model.d_model}, "
        f"{count.total:,} parameters ({count.scales:,} of them alphas and norms)"
    )
    if model.moe is not None:
        yield f"{model.moe.n_experts} experts, {model.moe.top_k} a token: {count.active:,} parameters active"
    epochs = config.steps * config.data.batch_size / run.loader.n_windows
    where = str(run.device) if run.world.size == 1 else f"{run.world.size} processes ({run.device.type})"
    yield (
        f"{config.steps:,} steps of {config.data.batch_size} x {model.context} tokens of {run.data.name} "
        f"({epochs:.2g} epochs), {run.precision_name} on {where}, into {run.run_dir.path}"
    )
    yield from run.loader.describe(config.steps)
    if run.step:
        yield f"going on from step {run.step}"
    if config.chunked_loss and not HAS_CHUNKED_LOSS:
        yield f"torch {torch.__version__} has no chunked loss: the plain one is used"


def sample(run: "Trainer", windows: torch.Tensor) -> dict[str, Any] | None:
    """A row for samples.jsonl: the start of a text, continued by the model; None if the run wants none.

    All processes of a run must call it: each holds parts of the model that the others need.

    Args:
        run: the run.
        windows: held-out tokens `[N, T]`, of which the first row is the text.
    """
    if not run.config.sample_tokens or run.data.tokenizer is None:
        return None
    prompt = windows[:1, : min(24, run.config.model.context)].to(run.device)
    generator = torch.Generator(run.device).manual_seed(run.config.seed)
    autocast = torch.autocast(run.device.type, run.autocast_dtype, enabled=run.autocast_dtype is not None)
    # each step of generation has another shape: compiled blocks would be compiled for every one
    eager = torch.compiler.set_stance("force_eager") if run.config.compile else nullcontext()
    run.model.eval()
    with gathered(run.model), autocast, eager:
        whole = generate(run.model, prompt, run.config.sample_tokens, temperature=0.8, top_p=0.95, generator=generator)
    run.model.train()
    tokens, cut, decode = whole[0].tolist(), prompt.shape[1], run.data.tokenizer.decode
    return {"step": run.step, "prompt": decode(tokens[:cut]), "text": decode(tokens[cut:])}
