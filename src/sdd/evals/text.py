"""A trained run at work: continue a text, and the loss on a text. Behind `sdd generate` and `sdd eval`."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdd import config_io
from sdd.data import Tokenizer, builtin_tokenizer
from sdd.errors import UserError
from sdd.models import LanguageModel, generate
from sdd.train.checkpoint import DamagedCheckpoint, list_checkpoints, load_checkpoint
from sdd.train.config import RunConfig
from sdd.train.data import resolve
from sdd.train.evaluate import Evaluation, evaluate
from sdd.train.loop import pick_autocast, pick_device

_log = logging.getLogger(__name__)
_ROWS = 8  # windows a forward pass
_WINDOWS = 1024  # windows in memory


@dataclass(frozen=True)
class TrainedRun:
    """A run's model at its newest whole checkpoint, in evaluation mode, on the device that its config names."""

    config: RunConfig
    model: LanguageModel
    step: int


def load_trained(run: Path) -> TrainedRun:
    """The model of a run directory.

    Raises:
        UserError: if it holds no run or no whole checkpoint.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run (no config.json): runs are made by sdd train PRESET --out RUN")
    config = config_io.load(run / "config.json")
    model = LanguageModel(config.model).to(pick_device(config.device)).eval()
    for path in reversed(list_checkpoints(run / "checkpoints")):
        try:
            return TrainedRun(config, model, load_checkpoint(path, model)["step"])
        except DamagedCheckpoint as error:
            _log.warning("passed over: %s", error)
    raise UserError(f"{run} has no whole checkpoint: one is written while it trains, sdd resume {run} goes on with it")


def continue_text(
    run: Path,
    prompt: str,
    tokens: int,
    seed: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
) -> str:
    """Continue a text.

    Args:
        run: the run directory.
        prompt: what to continue; not part of the answer.
        tokens: how many tokens to add; it may end earlier, at an end of text.
        seed: of the draws.
        temperature: see `sdd.models.generate`, as for top_k and top_p.
        top_k: sample among the k most likely tokens.
        top_p: sample among the most likely tokens of this total probability.

    Raises:
        UserError: if the run has no whole checkpoint or no tokenizer, or the prompt is empty.
        ValueError: if a setting is out of range.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one character to continue")
    trained = load_trained(run)
    tokenizer = _tokenizer(trained.config)
    model = trained.model
    device = model.embed.weight.device
    ids = torch.tensor([tokenizer.encode(prompt)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    dtype = pick_autocast(trained.config.precision, device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        whole = generate(model, ids, tokens, eos=tokenizer.eos, generator=generator, **settings)
    return tokenizer.decode(whole[0, ids.shape[1] :].tolist())


def evaluate_run(run: Path, text: Path | None = None) -> dict[str, Any]:
    """Loss and bits per byte of a run's newest whole checkpoint on held-out text.

    Every token but the first is predicted once, from at most `context` tokens before it: the text is cut into windows
    of the model's context.

    Args:
        run: the run directory.
        text: a UTF-8 text file; None for all of the run's own held-out data.

    Returns:
        step, loss (nats a token), bits_per_byte (None if unknown), tokens (predicted ones), text (its name).

    Raises:
        UserError: if the run has no whole checkpoint or, for a text file, no tokenizer, or the file cannot be read.
    """
    trained = load_trained(run)
    config = trained.config
    data_eos: int | None
    if text is None:
        data = resolve(config)
        tokenizer, data_eos = data.tokenizer, data.eos
        ids, name = np.asarray(data.validation.tokens), f"held-out part of {data.name}"
    else:
        tokenizer = _tokenizer(config)
        data_eos = tokenizer.eos
        ids, name = np.array(tokenizer.encode(_read(text)), np.int64), str(text)
    if len(ids) < 2:
        raise UserError(f"{name} has {len(ids)} tokens: at least 2 are needed, one to predict the next from")
    evaluation = _evaluate_ids(trained, ids, tokenizer, data_eos if config.data.document_mask else None)
    return {
        "step": trained.step,
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "tokens": evaluation.tokens,
        "text": name,
    }


def _evaluate_ids(
    trained: TrainedRun, ids: np.ndarray, tokenizer: Tokenizer | None, document_eos: int | None
) -> Evaluation:
    token_bytes = None if tokenizer is None else tokenizer.token_bytes()
    dtype = pick_autocast(trained.config.precision, trained.model.embed.weight.device)
    nats, n_tokens, n_bytes = 0.0, 0, 0
    for windows in _windows(ids, trained.config.model.context):
        part = evaluate(trained.model, windows, _ROWS, document_eos=document_eos, autocast_dtype=dtype)
        nats += part.loss * part.tokens
        n_tokens += part.tokens
        n_bytes += 0 if token_bytes is None else int(token_bytes[windows[:, 1:].numpy()].sum())
    return Evaluation(nats / n_tokens, nats / math.log(2) / n_bytes if n_bytes else None, n_tokens)


def _windows(ids: np.ndarray, context: int) -> Iterator[torch.Tensor]:
    """The ids as windows that overlap by one token, many at a time; the last, shorter one comes alone."""
    whole = (len(ids) - 1) // context
    for first in range(0, whole, _WINDOWS):
        starts = np.arange(first, min(first + _WINDOWS, whole)) * context
        part = np.asarray(ids[starts[0] : starts[-1] + context + 1], np.int64)
        yield torch.from_numpy(part).unfold(0, context + 1, context)
    rest = np.asarray(ids[whole * context :], np.int64)
    if len(rest) > 1:
        yield torch.from_numpy(rest)[None]


def _tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run, without its data where they are not needed.

    Raises:
        UserError: if the run's data are tokens of which nobody knows what they mean.
    """
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    if config.data.path is None:
        return builtin_tokenizer()
    tokenizer = resolve(config).tokenizer
    if tokenizer is None:
        raise UserError(f"the tokenizer of {config.data.path} is not known: text needs data.tokenizer in config.json")
    return tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
