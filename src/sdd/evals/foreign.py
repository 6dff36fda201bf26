"""A folder of a transformers model as a `Scorer`: what others trained, or what `sdd export` wrote."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdd.data import Tokenizer
from sdd.errors import UserError, is_out_of_memory, one_line, require_extra
from sdd.evals.scorer import digest
from sdd.evals.text import check_enough, starts_of, windows_of
from sdd.evals.texts import read_texts, token_ids
from sdd.files import read_json_object
from sdd.train.parallel import pick_device

_log = logging.getLogger(__name__)
_UNKNOWN_CONTEXT = 2048
_LOGITS = 1 << 26  # of a forward pass
_NO_LIMIT = 10**6  # tokenizers without a limit state a far larger one


def is_transformers(folder: Path) -> bool:
    """Whether a folder holds a model of transformers: its config.json names a model type."""
    return "model_type" in read_json_object(folder / "config.json")


class TransformersScorer:
    """A causal language model that `AutoModelForCausalLM.from_pretrained` loads, and its tokenizer.

    It runs on the GPU in the precision it was saved in, and on a CPU in float32. A beginning-of-text token that its
    tokenizer puts before a text stands before each context and each text.

    Args:
        folder: the model's.

    Raises:
        MissingPackage: without transformers.
        UserError: if transformers cannot load the folder, or would draw weights that it lacks.
    """

    def __init__(self, folder: Path) -> None:
        [library] = require_extra("hf", "transformers", needed_by=str(folder))
        self._device = pick_device("auto")
        dtype = torch.float32 if self._device.type == "cpu" else "auto"
        model: Any = _load_model(library.AutoModelForCausalLM, folder, dtype)
        words: Any = _load(library.AutoTokenizer, folder)
        self._model, self._words = model.to(self._device).eval(), words
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        before = words("a")["input_ids"][:1]
        self._begin = before if before == [words.bos_token_id] else []
        self.start = words.bos_token_id if words.bos_token_id is not None else words.eos_token_id
        self.end: int | None = words.eos_token_id
        self.context = _context(model.config, words)
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.tokenizer = _bytes_of(folder, words)
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        self.key = digest(facts, self._device.type, dtype)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, after the beginning of text if the tokenizer puts one there."""
        found = self._words(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [self._begin + ids for ids in found]

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, first: int) -> Tensor:
        """See `Scorer.logits`."""
        kept = tokens_BT.shape[1] - first
        options = {"logits_to_keep": kept} if self._keeps else {}
        found = self._model(input_ids=tokens_BT.to(self._device), use_cache=False, **options).logits
        return found[:, -kept:].float()


def evaluate_transformers(
    model: TransformersScorer,
    text: str,
    sequences: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    field: str = "text",
) -> dict[str, Any]:
    """Compute the loss and the bits per byte of a transformers model on held-out text, see `evaluate_run`.

    A beginning of text that the tokenizer puts before a text stands before each document; it counts no bytes.

    Args:
        model: the model.
        text: a file, folder or dataset, see `read_texts`.
        sequences: only so many windows, spread evenly; None for all of the text.
        progress: is told the windows done, and all of them, now and then.
        field: of JSON lines, parquet and datasets.

    Returns:
        loss (nats a token), bits_per_byte (None if unknown), tokens (number of predictions), text (its name).

    Raises:
        UserError: if the file cannot be read or has no token to predict.
    """
    ids = token_ids(read_texts(text, field), text, model.encode, model.end)
    check_enough(ids, text)
    sizes = None if model.tokenizer is None else model.tokenizer.token_bytes(model.vocab_size)
    starts = starts_of(len(ids), model.context, sequences)
    nats, n_tokens, n_bytes, done = 0.0, 0, 0, 0
    for windows in windows_of(ids, model.context, starts):
        for rows in windows.split(max(1, _LOGITS // (model.context * model.vocab_size))):
            logits, targets = model.logits(rows[:, :-1], 0), rows[:, 1:]
            nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="sum").item()
            n_tokens += targets.numel()
            n_bytes += 0 if sizes is None else int(np.asarray(sizes)[targets.numpy()].sum())
            done += len(rows)
            progress(done, len(starts))
    bits = nats / math.log(2) / n_bytes if n_bytes else None
    return {"loss": nats / n_tokens, "bits_per_byte": bits, "tokens": n_tokens, "text": text}


def _load(auto: Any, folder: Path, **options: Any) -> Any:
    try:  # without a word on code in the folder, transformers would ask at the terminal
        return auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # of several libraries, whose errors share no base class
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder} needs code of its own, which sdd does not run: give a model that transformers knows"
            ) from None
        raise UserError(f"transformers cannot load {folder}: {one_line(error)[:300]}") from None


def _load_model(auto: Any, folder: Path, dtype: Any) -> Any:
    """The model with the folder's own weights: transformers draws those that are missing."""
    model, found = _load(auto, folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(map(str, found["missing_keys"])):
        raise UserError(f"the weights of {folder} do not fit its config ({len(missing)} missing, first {missing[0]})")
    if left := sorted(map(str, found["unexpected_keys"])):
        _log.warning("%s: %d weights have no place in the model and do not count, first %s", folder, len(left), left[0])
    return model


def _context(config: Any, words: Any) -> int:
    stated = getattr(config, "max_position_embeddings", None) or getattr(words, "model_max_length", None)
    return int(stated) if stated and stated < _NO_LIMIT else _UNKNOWN_CONTEXT


def _bytes_of(folder: Path, words: Any) -> Tokenizer | None:
    """The fast tokenizer as ours, which knows the bytes of each token."""
    backend = getattr(words, "backend_tokenizer", None)
    if backend is None:
        return None
    return Tokenizer(folder / "tokenizer.json", backend.to_str().encode(), words.eos_token_id)
