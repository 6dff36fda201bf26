"""Placements against the models that others wrote: transformers' OLMo 2, Llama and Qwen 3."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers_models import drawn_tokens, tiny_model
from torch import Tensor

from sdd.models import LanguageModel
from sdd.placement import placements

EPS = 1e-3  # large enough for a forgotten eps to show
LLAMA_NORMS = {"input_layernorm": "attn_in", "post_attention_layernorm": "ffn_in"}
OLMO2_NORMS = {
    "post_attention_layernorm.weight": "attn.o_proj.alpha",
    "post_feedforward_layernorm.weight": "ffn.down_proj.alpha",
}
MODELS = {"prenorm": "Llama", "prenorm-qk": "Qwen3", "olmo2": "Olmo2"}


def our_name(name: str, placement: str) -> str:
    """Our name of one of transformers' parameters."""
    names = {
        **(OLMO2_NORMS if placement == "olmo2" else LLAMA_NORMS),
        "self_attn.q_norm.weight": "attn.q_proj.alpha",
        "self_attn.k_norm.weight": "attn.k_proj.alpha",
        "model.layers": "blocks",
        "model.embed_tokens": "embed",
        "model.norm": "final_norm",
        "lm_head": "head",
        "self_attn": "attn",
        "mlp": "ffn",
    }
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def pair(placement: str, tied: bool, n_kv_heads: int) -> tuple[LanguageModel, transformers.PreTrainedModel]:
    """Our model and theirs, built from the same numbers, with our weights copied into theirs."""
    ours = tiny_model(
        placements[placement].replace_eps(EPS), tie_embeddings=tied, n_kv_heads=n_kv_heads, rope_theta=10_000.0
    )
    config = ours.config
    their_config = getattr(transformers, MODELS[placement] + "Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=EPS,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    theirs = getattr(transformers, MODELS[placement] + "ForCausalLM")(their_config)
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights.pop(our_name(name, placement)))
    assert not weights, f"not in transformers' model: {list(weights)}"
    return ours, theirs


@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("placement", MODELS)
def test_logits_and_every_gradient_are_those_of_transformers(placement: str, tied: bool, n_kv_heads: int):
    ours, theirs = pair(placement, tied, n_kv_heads)
    tokens = drawn_tokens(ours.config)
    logits = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), logits, rtol=1e-5, atol=1e-5)

    targets = tokens.roll(-1, 1)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    ours(tokens, targets).backward()
    expected: dict[str, Tensor] = {our_name(name, placement): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )
