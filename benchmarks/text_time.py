"""CPU time of cutting and tokenising a document against its length, for ten kinds of text and three tokenizers."""

import argparse
import base64
import importlib.metadata
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from _record import write_result
from sdd.data import Tokenizer, builtin_tokenizer
from sdd.data.spec import CLASSICS, existing
from sdd.data.text import Document
from sdd.data.unpack import lines

WITHIN_A_PIECE = [2**12, 2**14, 60_000]
OF_PIECES = [2**18, 2**19, 2**20]
TRAINING_DOCUMENTS = 300
CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
THAI = "กขคงจฉชซญดตถทนบปผพฟมยรลวสหอะาิีุูเแโไ"


def documents() -> Iterator[str]:
    """The documents of the built-in corpus."""
    path = existing(CLASSICS)
    with path.open("rb") as file:
        for line in lines(path, file):
            yield json.loads(line)["text"]


def kinds(prose: str) -> dict[str, Callable[[random.Random, int], str]]:
    """A text of about so many bytes of each kind, drawn with the given generator."""
    words = prose.split()

    def joined(separator: str) -> Callable[[random.Random, int], str]:
        return lambda rng, size: separator.join(rng.choices(words, k=size // 6))

    def csv(rng: random.Random, size: int) -> str:
        row = "{},{:.4f},{},2024-01-{:02d}\n".format
        return "".join(row(n, rng.random(), rng.choice(words), n % 28 + 1) for n in range(size // 32))

    return {
        "prose": lambda _, size: prose[:size],
        "one line": joined(" "),
        "one word a line": joined("\n"),
        "words between tabs": joined("\t"),
        "blank lines": lambda _, size: "\n" * size,
        "Chinese, one line": lambda rng, size: "".join(rng.choices(CHINESE, k=size // 3)),
        "Thai, one line": lambda rng, size: "".join(rng.choices(THAI, k=size // 3)),
        "base64": lambda rng, size: base64.b64encode(rng.randbytes(size * 3 // 4)).decode(),
        "digits": lambda rng, size: "".join(rng.choices("0123456789", k=size)),
        "CSV": csv,
    }


def trained(texts: list[str], metaspace: bool) -> Tokenizer:
    """A BPE of the tokenizers library, byte-level as GPT-2's or with metaspace as Llama's."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=metaspace, unk_token="<unk>" if metaspace else None))
    special = ["</s>"]
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][:2]
    return Tokenizer(Path("trained"), json.dumps(spec).encode())


def seconds(tokenizer: Tokenizer, text: str, rounds: int) -> tuple[float, float]:
    """The least CPU time of cutting a document into pieces, and of encoding these."""
    cutting, encoding = [], []
    for _ in range(rounds):
        data = text.encode()
        began = time.process_time()
        document = Document("x", io.BytesIO(data), len(data))
        pieces = [piece.decode() for piece, _ in document.pieces(0, len(data), tokenizer.last_cut)]
        cut = time.process_time()
        tokenizer.encode_batch(pieces, [True] + [False] * (len(pieces) - 1))
        cutting.append(cut - began)
        encoding.append(time.process_time() - cut)
    return min(cutting), min(encoding)


def measured(tokenizer: Tokenizer, draw: Callable[[random.Random, int], str], rounds: int) -> dict[str, Any]:
    """Times at all lengths, and the exponents k of fits time = c * bytes^k: below a piece of 64 KiB, and above."""
    texts = [draw(random.Random(size), size) for size in (*WITHIN_A_PIECE, *OF_PIECES)]
    n_bytes = [len(text.encode()) for text in texts]
    times = [seconds(tokenizer, text, rounds) for text in texts]
    totals = [sum(pair) for pair in times]
    below, above = slice(len(WITHIN_A_PIECE)), slice(len(WITHIN_A_PIECE), None)
    slopes = [float(np.polyfit(np.log(n_bytes[part]), np.log(totals[part]), 1)[0]) for part in (below, above)]
    return {
        "exponent_within_a_piece": round(slopes[0], 3),
        "exponent_of_pieces": round(slopes[1], 3),
        "mb_per_second_60_kb": n_bytes[2] / 1e6 / totals[2],
        "mb_per_second_1_mib": n_bytes[-1] / 1e6 / totals[-1],
        "cutting_share": times[-1][0] / totals[-1],
        "bytes": n_bytes,
        "seconds": totals,
    }


def main() -> None:
    """Measure and write benchmarks/results/text_time.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="the least time of so many counts (default 3)")
    rounds = parser.parse_args().rounds
    texts = [text for text, _ in zip(documents(), range(TRAINING_DOCUMENTS), strict=False)]
    prose = "\n".join(texts)
    named = {
        "built-in": builtin_tokenizer(),
        "BPE, byte-level": trained(texts, metaspace=False),
        "BPE, metaspace": trained(texts, metaspace=True),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, tokenizer in named.items():
        found[name] = {}
        for kind, draw in kinds(prose).items():
            found[name][kind] = row = measured(tokenizer, draw, rounds)
            print(
                f"{name:16} {kind:20} exponents {row['exponent_within_a_piece']:.2f}, "
                f"{row['exponent_of_pieces']:.2f}; {row['mb_per_second_1_mib']:.2f} MB/s",
                flush=True,
            )
    rows = [row for by_kind in found.values() for row in by_kind.values()]
    exponents = [row[name] for row in rows for name in ("exponent_within_a_piece", "exponent_of_pieces")]
    file = write_result(
        "text_time",
        {
            "what": "CPU time of cutting a document and encoding the pieces; exponent k of a fit time = c * bytes^k",
            "tokenizers": importlib.metadata.version("tokenizers"),
            "rounds": rounds,
            "largest_exponent": max(exponents),
            "smallest_mb_per_second": min(row["mb_per_second_1_mib"] for row in rows),
            "by_tokenizer": found,
        },
    )
    print(f"wrote {file}; the largest exponent is {max(exponents):.2f}")


if __name__ == "__main__":
    main()
