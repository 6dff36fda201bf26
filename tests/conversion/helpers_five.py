"""Five models whose kinds the code does not name, and real data for each of them."""

import json
import wave
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Stranger(NamedTuple):
    """A class of transformers with the fields of its config, what loads it, and what gives it batch s."""

    model: str
    config: str
    fields: dict[str, Any]
    auto: str
    batches: Callable[[], Callable[[int], Batch]]
    packages: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**self.fields))


def texts() -> Callable[[int], Batch]:
    """Bytes of the built-in classics."""
    asset = (files("sdd.data") / "assets" / "classics.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().stream_reader(asset).read(2_000_000).splitlines()[:-1]
    tokens = torch.tensor(list("\n".join(json.loads(line)["text"] for line in lines).encode()))

    def batch(step: int) -> Batch:
        starts = torch.randint(len(tokens) - 32, (8,), generator=torch.Generator().manual_seed(step))
        chosen = torch.stack([tokens[start : start + 32] for start in starts])
        return {"input_ids": chosen, "labels": chosen}

    return batch


def handwriting() -> Callable[[int], Batch]:
    """The 1,797 handwritten digits that ship with scikit-learn, 8x8 pixels magnified four times."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (images.float().view(-1, 1, 8, 8) / 8 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)

    def batch(step: int) -> Batch:
        chosen = torch.randint(len(images), (16,), generator=torch.Generator().manual_seed(step))
        return {"pixel_values": images[chosen].expand(-1, 3, -1, -1), "labels": labels[chosen]}

    return batch


def speech() -> Callable[[int], Batch]:
    """The spoken digits that ship with captcha (ten recordings), in drawn pieces of half a second, with noise."""
    spec = find_spec("captcha")
    assert spec is not None
    assert spec.origin is not None
    sounds = [_sound(Path(spec.origin).parent / "data" / str(digit) / "default.wav") for digit in range(10)]

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(10, (16,), generator=generator)
        starts = torch.rand(16, generator=generator)
        pieces = [_piece(sounds[digit], start) for digit, start in zip(labels.tolist(), starts.tolist(), strict=True)]
        clean = torch.stack(pieces)
        return {"input_values": clean + 0.05 * torch.randn(clean.shape, generator=generator), "labels": labels}

    return batch


def _sound(path: Path) -> Tensor:
    """8 bits, 8,000 samples a second; brought to variance 1."""
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    sound = torch.from_numpy(samples.astype(np.float32)) - 128
    return sound / sound.std()


def _piece(sound: Tensor, start: float, size: int = 4000) -> Tensor:
    padded = torch.nn.functional.pad(sound, (0, max(0, size + 1 - len(sound))))
    first = int(start * (len(padded) - size))
    return padded[first : first + size]


_WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {
    "vocab_size": 256,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_WIDTHS,
}
_SOUND = {
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 4, 4),
    "num_feat_extract_layers": 3,
    "classifier_proj_size": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "num_labels": 10,
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout"), 0.0
    ),
    **_WIDTHS,
}
STRANGERS = {
    "decoder": Stranger("StableLmForCausalLM", "StableLmConfig", _TEXT, "AutoModelForCausalLM", texts),
    "another decoder": Stranger("Starcoder2ForCausalLM", "Starcoder2Config", _TEXT, "AutoModelForCausalLM", texts),
    "moe": Stranger(
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        "AutoModelForCausalLM",
        texts,
    ),
    "vision": Stranger(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_labels": 10, "image_size": 32},
        "AutoModelForImageClassification",
        handwriting,
        ("sklearn",),
    ),
    "audio": Stranger(
        "HubertForSequenceClassification",
        "HubertConfig",
        _SOUND,
        "AutoModelForAudioClassification",
        speech,
        ("captcha",),
    ),
}
