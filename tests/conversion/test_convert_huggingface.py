"""Conversion of Hugging Face models, built from a config without downloads."""

import pytest
import torch
from torch import nn

from sdd import SDDLinear
from sdd.conversion import convert

transformers = pytest.importorskip("transformers")
load_model = pytest.importorskip("safetensors.torch").load_model

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_key_value_heads=2, **changes))


def test_llama():
    model = llama()
    report = convert(model)
    assert str(report).splitlines()[:11] == [
        "21 layers converted, all their weights redrawn, 6 of them output projections; L = 3 blocks",
        "85.9% of the model's 8,048 parameters are in converted layers",
        "",
        "converted                             V [out, in]  alpha",
        "model.layers.{0..2}.self_attn.q_proj  [16, 16]     1",
        "model.layers.{0..2}.self_attn.k_proj  [8, 16]      1",
        "model.layers.{0..2}.self_attn.v_proj  [8, 16]      1",
        "model.layers.{0..2}.self_attn.o_proj  [16, 16]     0.5774  output",
        "model.layers.{0..2}.mlp.gate_proj     [32, 16]     1",
        "model.layers.{0..2}.mlp.up_proj       [32, 16]     1",
        "model.layers.{0..2}.mlp.down_proj     [16, 32]     0.5774  output",
    ]
    assert [layer.name for layer in report.kept] == ["lm_head"]
    assert report.notes == ()


def test_a_tied_llama_keeps_its_head():
    model = llama(tie_word_embeddings=True)
    report = convert(model)
    assert {layer.name: layer.reason for layer in report.kept} == {
        "lm_head": "tied: another module owns the same parameter"
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_into_a_converted_one(tied, tmp_path):
    """Build, convert, load: without the description in the config; test_pretrained.py has the shorter ways."""
    model = llama(tie_word_embeddings=tied)
    convert(model, eps=1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    loaded = llama(tie_word_embeddings=tied)
    convert(loaded, eps=1e-4)
    load_model(loaded, tmp_path / "model.safetensors")
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_a_converted_llama_learns_whatever_the_scale_of_v():
    model = llama()
    convert(model, eps=1e-12, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=tokens).logits
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SDDLinear):
                module.weight.mul_(3.0)
    torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=1e-3, atol=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_half_precision_llama_keeps_alpha_in_float32():
    model = llama().to(torch.bfloat16)
    convert(model)
    q_proj = model.model.layers[0].self_attn.q_proj
    assert q_proj.weight.dtype == torch.bfloat16
    assert q_proj.alpha.dtype == torch.float32
    tokens = torch.arange(16)[None]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_cached_generation_equals_the_full_forward():
    model = llama().eval()
    convert(model)
    prompt = torch.arange(1, 6)[None]  # 0 is the padding
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        greedy = model(input_ids=tokens).logits.argmax(-1)
    assert torch.equal(tokens[0, 5:], greedy[0, 4:-1])


def test_bert_outputs_and_tied_decoder():
    report = convert(transformers.BertForMaskedLM(transformers.BertConfig(**TINY)))
    outputs = {layer.name.split(".", 4)[-1] for layer in report.converted if layer.is_output}
    assert outputs == {"attention.output.dense", "output.dense"}
    assert [layer.name for layer in report.kept] == ["cls.predictions.decoder"]
