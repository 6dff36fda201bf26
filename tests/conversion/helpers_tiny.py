"""Tiny models of transformers, shared by the tests of saving and loading."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.arange(1, 10)[None]


def build(kind: str = "Llama", head: str = "ForCausalLM", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **changes)
    return getattr(transformers, f"{kind}{head}")(config).eval()


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.5, 1.5)
    return model


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS)[0]
