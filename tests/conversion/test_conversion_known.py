"""Published models that read weights themselves: the proof refutes those layers, and a table keeps them without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdd.conversion import convert, known

hf = pytest.importorskip("transformers")

TOKENS = {"input_ids": torch.arange(1, 9)[None]}


def mamba() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2)
    return hf.MambaForCausalLM(config), TOKENS


def rwkv() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.RwkvConfig(
        vocab_size=32, hidden_size=16, attention_hidden_size=16, num_hidden_layers=3, rescale_every=1
    )
    return hf.RwkvForCausalLM(config), TOKENS


def bloom(exact: bool = True) -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.BloomConfig(
        vocab_size=32, hidden_size=16, n_layer=2, n_head=4, slow_but_exact=exact, pretraining_tp=1 + exact
    )
    return hf.BloomForCausalLM(config), TOKENS


def mobilebert() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 32, "intra_bottleneck_size": 8}
    config = hf.MobileBertConfig(vocab_size=32, num_hidden_layers=1, num_attention_heads=4, true_hidden_size=8, **sizes)
    return hf.MobileBertForMaskedLM(config), TOKENS


def wavlm() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.WavLMConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_buckets=8,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    return hf.WavLMModel(config), {"input_values": torch.randn(1, 400)}


def gemma3n() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 16, "hidden_size_per_layer_input": 8, "intermediate_size": 32, "laurel_rank": 4}
    config = hf.Gemma3nTextConfig(
        vocab_size=32,
        vocab_size_per_layer_input=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
        **sizes,
    )
    return hf.Gemma3nForCausalLM(config), TOKENS


def swin() -> tuple[nn.Module, Tensor]:
    vision = pytest.importorskip("torchvision")
    sizes = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": [4, 4]}
    return vision.models.swin_transformer.SwinTransformer(**sizes, num_classes=5), torch.randn(1, 3, 16, 16)


#: Model, the layers that must be refuted by the ending of their names, and words of the reason.
CASES: list[tuple[Callable[[], Any], set[str], str]] = [
    (mamba, {"dt_proj"}, "reads its weight instead of calling the layer"),
    (rwkv, {"attention.output", "feed_forward.value"}, "changes its weight in a forward pass, in evaluation mode"),
    (bloom, {"self_attention.dense", "dense_4h_to_h"}, "reads its weight instead of calling the layer"),
    (mobilebert, {"predictions.dense"}, "reads its weight instead of calling the layer"),
    (wavlm, {"q_proj", "k_proj", "v_proj", "out_proj"}, "reads its weight instead of calling the layer"),
    (swin, {"attn.qkv", "attn.proj"}, "reads its weight instead of calling the layer"),
    (gemma3n, {"correction_coefs"}, "reads its weight instead of calling the layer, in training mode"),
]


def asked(model: nn.Module) -> list[str]:
    """All layers, and by name what would stay as a time step."""
    return ["*", *(name for name, _ in model.named_modules() if name.endswith("dt_proj"))]


@pytest.mark.parametrize(("build", "endings", "reason"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_proof_refutes_what_the_model_reads_itself(build, endings, reason, monkeypatch):
    monkeypatch.setattr(known, "KNOWN", ())
    monkeypatch.setattr(known, "KNOWN_IF", ())
    torch.manual_seed(0)
    model, example = build()
    proof = convert(model, asked(model), example=example).proof
    assert proof is not None
    refuted = proof.named("refuted")
    assert {ending for ending in endings if any(name.endswith(ending) for name in refuted)} == endings
    assert all(name.endswith(tuple(endings)) for name in refuted)
    assert all(reason in found for found in refuted.values())
    assert proof.named("proven")


@pytest.mark.parametrize(("build", "endings"), [case[:2] for case in CASES], ids=[case[0].__name__ for case in CASES])
def test_the_table_keeps_them_without_an_example(build, endings):
    model = build()[0]
    report = convert(model, asked(model))
    assert not any(layer.name.endswith(tuple(endings)) for layer in report.converted)
    reasons = {layer.name: layer.reason for layer in report.kept if layer.name.endswith(tuple(endings))}
    assert reasons
    assert all("its model" in reason for reason in reasons.values())


def test_an_attribute_may_be_needed():
    assert any(layer.name.endswith("dense_4h_to_h") for layer in convert(bloom(exact=False)[0]).converted)
