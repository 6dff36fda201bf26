"""Train the built-in tokenizer on the training part of the classics: `python -m sdd.data.build_assets`.

The result depends on nothing but classics.jsonl.zst and the version of the tokenizers library.
"""

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from sdd.data.inputs import documents, find_inputs
from sdd.data.source import VALIDATION_FRACTION
from sdd.data.spec import CLASSICS
from sdd.data.text import TailSplit
from sdd.data.tokenizer import BUILTIN

VOCAB_SIZE = 4096
EOS = "<|endoftext|>"
# GPT-4's pattern, but for digits in pairs rather than threes: a thousand three-digit tokens would be a quarter of this
# vocabulary. It covers every character, so nothing is lost.
PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,2}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def training_text() -> Iterator[str]:
    """The classics without the held-out tails."""
    (corpus,) = find_inputs([CLASSICS])
    split = TailSplit(VALIDATION_FRACTION, corpus.size)
    for _, document in documents(corpus, "text"):
        if document:
            yield "".join(data.decode() for data, _ in document.pieces(0, split.cut(document)))


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens: `EOS`, the 256 bytes, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return tokenizer


if __name__ == "__main__":
    BUILTIN.write_text(train_tokenizer().to_str(), encoding="utf-8")
