"""Runs as the model `sdd` of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

    python -m sdd.interop.lm_eval run --model sdd --model_args run=runs/mine --tasks sciq,arc_easy

is lm-eval's own command with this model added. From Python:

    from sdd.interop.lm_eval import SDDModel
    lm_eval.simple_evaluate(model=SDDModel("runs/mine"), tasks=["sciq"])

Importing this module raises MissingPackage without lm-eval (`pip install 'sdd-torch[lm-eval]'`).
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdd.errors import SddError, UserError, one_line, require_extra, unknown
from sdd.evals.generation import continue_texts
from sdd.evals.likelihood import Pair, encode_pairs, score
from sdd.evals.scorer import RunScorer
from sdd.evals.text import load_trained

_model, _registry = require_extra("lm-eval", "lm_eval.api.model", "lm_eval.api.registry", needed_by=__name__)
_MAX_TOKENS = 256  # of a generated text, where the task does not say


@_registry.register_model("sdd")
class SDDModel(_model.LM):
    """A run directory as a model of lm-eval.

    Contexts and continuations are tokenised and scored as by `sdd eval --tasks`: white space after a context belongs to
    the continuation, and contexts are cut off on the left. Device and precision are those of the run's config.

    Args:
        run: the run directory.
        checkpoint: step or path of a checkpoint; None for the newest that is whole.
        batch_size: the most requests at once; "auto" is 16.
        max_batch_size: of lm-eval, not used.
        device: of lm-eval, not used: the config names the device.
        others: refused; lm-eval hands on every word of --model_args.

    Raises:
        UserError: see `load_trained`; or if the run has no tokenizer, none is named, or there are others.
    """

    def __init__(
        self,
        run: str = "",
        checkpoint: str | int | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise unknown("argument of the model sdd", next(iter(others)), ("run", "checkpoint"))
        if not run:
            raise UserError("the model sdd needs a run: --model_args run=RUN")
        self._trained = load_trained(Path(run), None if checkpoint is None else str(checkpoint))
        self._scorer = RunScorer(self._trained)
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 16

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm-eval's caches."""
        return f"sdd-{self._scorer.key[:16]}"

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding gives it."""
        texts = [tuple(request.args) for request in requests]
        return self._scores("loglikelihood", requests, encode_pairs(self._scorer, texts))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats, after an end of text, in stretches of the model's context."""
        if self._scorer.start is None:
            raise UserError("the run's tokenizer has no end of text, after which a text could begin")
        texts = self._scorer.encode([request.args[0] for request in requests])
        pairs = [Pair([self._scorer.start, *ids], 1) for ids in texts]
        empty = [index for index, ids in enumerate(texts) if not ids]
        known = [pair for index, pair in enumerate(pairs) if index not in empty]
        found = iter(self._scores("loglikelihood_rolling", requests, known))
        return [0.0 if index in empty else next(found)[0] for index in range(len(pairs))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, greedy unless the task samples, which ends before a stop string."""
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(index)
        for group in groups.values():
            settings = dict(requests[group[0]].args[1])
            until = settings.get("until") or []
            found = continue_texts(
                self._trained,
                [requests[index].args[0] for index in group],
                int(settings.get("max_gen_toks", _MAX_TOKENS)),
                stop=[until] if isinstance(until, str) else list(until),
                batch_size=self._batch_size,
                **_sampling(settings),
            )
            for index, continuation in zip(group, found, strict=True):
                texts[index] = continuation.text
                self.cache_hook.add_partial("generate_until", requests[index].args, continuation.text)
        return texts

    def _scores(self, kind: str, requests: Sequence[Any], pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for indices, scores in score(self._scorer, pairs, self._batch_size):
            for index, each in zip(indices, scores, strict=True):
                found[index] = (each.logprob, each.greedy)
                if kind == "loglikelihood":
                    self.cache_hook.add_partial(kind, requests[index].args, found[index])
        return [found[index] for index in range(len(pairs))]


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    if not settings.get("do_sample", settings.get("temperature", 0) > 0):
        return {"temperature": 0.0}
    chosen = {name: settings[name] for name in ("top_k", "top_p") if settings.get(name)}
    return {"temperature": float(settings.get("temperature", 1.0)), **chosen}


def main() -> int:
    """Run lm-eval's command; returns its exit code. What is wrong with the run is one line, as everywhere."""
    try:
        require_extra("lm-eval", "lm_eval.__main__", needed_by=__name__)[0].cli_evaluate()
    except SddError as error:
        print(f"sdd: {error.heading}{one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
