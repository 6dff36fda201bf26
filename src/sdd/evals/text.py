"""Model and tokenizer of a trained run, and its loss on a text, for `sdd eval`."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdd.data import Tokenizer, builtin_tokenizer
from sdd.errors import UserError
from sdd.evals.texts import read_texts, token_ids
from sdd.models import LanguageModel
from sdd.train import config_io
from sdd.train.checkpoint import DamagedCheckpoint, list_checkpoints, load_checkpoint
from sdd.train.config import RunConfig, resolve
from sdd.train.evaluate import Evaluation, evaluate
from sdd.train.parallel import pick_autocast, pick_device

_log = logging.getLogger(__name__)
_ROWS = 8  # windows a forward pass
_WINDOWS = 128  # windows in memory, and between two reports of progress


@dataclass(frozen=True)
class TrainedRun:
    """A run's model at one of its checkpoints, in evaluation mode, on the device that its config names."""

    config: RunConfig
    model: LanguageModel
    step: int
    checkpoint: Path | None = None


def load_trained(run: Path, checkpoint: str | None = None) -> TrainedRun:
    """Load the model of a run directory.

    Args:
        run: the run directory.
        checkpoint: the step or the path of a checkpoint; None for the newest that is whole.

    Raises:
        UserError: if the directory holds no run, or the checkpoint is missing or damaged.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run (it has no config.json): sdd train PRESET --out RUN makes one")
    config = config_io.load(run / "config.json")
    model = LanguageModel(config.model).to(pick_device(config.device)).eval()
    if checkpoint is not None:
        path = _find_checkpoint(run, checkpoint)
        return TrainedRun(config, model, load_checkpoint(path, model)["step"], path)
    for path in reversed(list_checkpoints(run / "checkpoints")):
        try:
            return TrainedRun(config, model, load_checkpoint(path, model)["step"], path)
        except DamagedCheckpoint as error:
            _log.warning("checkpoint skipped: %s", error)
    raise UserError(f"{run} has no whole checkpoint: continue training with sdd resume {run} until one is written")


def _find_checkpoint(run: Path, name: str) -> Path:
    there = list_checkpoints(run / "checkpoints")
    if not name.isdecimal():
        if not Path(name).is_dir():
            raise UserError(f"there is no checkpoint {name}: give a step or the folder of a checkpoint")
        return Path(name)
    steps = {int(path.name.removeprefix("step-")): path for path in there}
    if int(name) not in steps:
        raise UserError(f"{run} has no checkpoint of step {name}: it has {', '.join(map(str, steps)) or 'none'}")
    return steps[int(name)]


def evaluate_run(
    run: Path | TrainedRun,
    text: Path | str | None = None,
    sequences: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    field: str = "text",
) -> dict[str, Any]:
    """Compute the loss and the bits per byte of a run on held-out text.

    The text is cut into windows of the model's context. So every token but the first is predicted once, from at most
    `context` tokens before it. Bits per byte are the code length of all predicted tokens, ends of text included, over
    the bytes of those with text: an end of text, a special token and a byte without a token count no bytes. Each
    prediction is over the model's whole vocabulary, ids without text included.

    Args:
        run: the run directory, of which the newest whole checkpoint counts, or a run that is loaded.
        text: a file, folder or dataset, see `read_texts`; an end of text stands between two documents. None for all of
            the run's own held-out data.
        sequences: only so many windows, spread evenly as those of a run's own evaluations; None for all of the text.
        progress: is told the windows done, and all of them, now and then.
        field: of JSON lines, parquet and datasets.

    Returns:
        step, loss (nats a token), bits_per_byte (None if unknown), tokens (number of predictions), text (its name).

    Raises:
        UserError: if the run has no whole checkpoint, if the file cannot be read, or if it is a text and the run has no
            tokenizer.
    """
    trained = load_trained(run) if isinstance(run, Path) else run
    config = trained.config
    data_eos: int | None
    if text is None:
        data = resolve(config)
        tokenizer, data_eos = data.tokenizer, data.eos
        ids, name = np.asarray(data.validation.tokens), f"held-out part of {data.name}"
    else:
        tokenizer = tokenizer_of(config)
        data_eos = tokenizer.eos
        name = str(text)
        texts = read_texts(name, field)
        if lost := sum(map(tokenizer.lost_bytes, texts)):
            _log.warning("%s: %s bytes have no token and do not count", text, f"{lost:,}")
        ids = token_ids(texts, name, tokenizer.encode_batch, data_eos)
    check_enough(ids, name)
    eos = data_eos if config.data.document_mask else None
    evaluation = _evaluate_ids(
        trained, ids, tokenizer, eos, starts_of(len(ids), config.model.context, sequences), progress
    )
    return {
        "step": trained.step,
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "tokens": evaluation.tokens,
        "text": name,
    }


def check_enough(ids: np.ndarray, name: str) -> None:
    """Raise UserError unless there is a token to predict."""
    if len(ids) < 2:
        raise UserError(f"{name} has {len(ids)} tokens: at least 2 are needed, to predict one from the other")


def _evaluate_ids(
    trained: TrainedRun,
    ids: np.ndarray,
    tokenizer: Tokenizer | None,
    document_eos: int | None,
    starts: np.ndarray,
    progress: Callable[[int, int], None],
) -> Evaluation:
    token_bytes = None if tokenizer is None else tokenizer.token_bytes(trained.config.model.vocab_size)
    dtype = pick_autocast(trained.config.precision, trained.model.embed.weight.device)
    nats, n_tokens, n_bytes, done = 0.0, 0, 0, 0
    for windows in windows_of(ids, trained.config.model.context, starts):
        part = evaluate(trained.model, windows, _ROWS, document_eos=document_eos, autocast_dtype=dtype)
        nats += part.loss * part.tokens
        n_tokens += part.tokens
        n_bytes += 0 if token_bytes is None else int(token_bytes[windows[:, 1:].numpy()].sum())
        done += len(windows)
        progress(done, len(starts))
    return Evaluation(nats / n_tokens, nats / math.log(2) / n_bytes if n_bytes else None, n_tokens)


def starts_of(n_ids: int, context: int, sequences: int | None) -> np.ndarray:
    """First ids of the windows: of all, the last of which may be shorter, or of some whole ones, spread evenly."""
    whole = (n_ids - 1) // context
    if sequences is None or sequences > whole:
        return np.arange(0, n_ids - 1, context)
    return np.arange(sequences) * whole // sequences * context


def windows_of(ids: np.ndarray, context: int, starts: np.ndarray) -> Iterator[torch.Tensor]:
    """Cut the ids into windows that overlap by one token; yields many at a time, and a shorter last one alone."""
    whole = starts[starts + context < len(ids)]
    for first in range(0, len(whole), _WINDOWS):
        places = whole[first : first + _WINDOWS, None] + np.arange(context + 1)
        yield torch.from_numpy(np.asarray(ids[places], np.int64))
    if len(whole) < len(starts):
        yield torch.from_numpy(np.asarray(ids[starts[-1] :], np.int64))[None]


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """Load the tokenizer of a run; its data are opened only if nothing else names the tokenizer.

    Raises:
        UserError: if the run was trained on tokens without a known tokenizer.
    """
    if config.data.tokenizer:
        tokenizer, eos = Tokenizer.load(config.data.tokenizer), config.data.eos
        return tokenizer.with_end(tokenizer.token_id(eos) if isinstance(eos, str) else eos)
    if config.data.path is None:
        return builtin_tokenizer()
    tokenizer = resolve(config).tokenizer
    if tokenizer is None:
        raise UserError(f"the tokenizer of {config.data.path} is not known: name it in config.json as data.tokenizer")
    return tokenizer
