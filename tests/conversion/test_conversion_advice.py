"""Notes on a model's attention and dropout, and alpha by pattern, which is the remedy."""

import pytest
import torch
from helpers_trees import tree
from torch import nn

from sdd.conversion import convert

transformers = pytest.importorskip("transformers", minversion="5")


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, dropout_rate=0.0))


def gpt_neo() -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
    return transformers.GPTNeoModel(transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))


@pytest.mark.parametrize(("build", "name", "alpha"), [(t5, "'q'", "0.5"), (gpt_neo, "'q_proj'", "0.707")])
def test_unscaled_attention_is_noted_with_a_remedy(build, name: str, alpha: str):
    note = next(note for note in convert(build()).notes if "sqrt(d)" in note)
    assert f"alpha_init={{{name}: {alpha}, ...}}" in note


def test_the_remedy_brings_logits_to_unit_scale():
    """Queries and keys are alpha times unit rows: logits are alpha^2 times a sum of d products."""
    model = t5()
    convert(model, alpha_init={"SelfAttention.[qk]": 16**-0.25}, group="heads", generator=torch.Generator())
    attention = model.encoder.block[0].layer[0].SelfAttention
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    q, k = (layer(x).unflatten(-1, (4, 16)).transpose(0, 1) for layer in (attention.q, attention.k))
    assert (q @ k.transpose(1, 2)).std().item() == pytest.approx(1, abs=0.2)


def test_scaled_attention_is_not_noted():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=32, **sizes))
    assert not any("sqrt(d)" in note for note in convert(bert).notes)
    assert not any("sqrt(d)" in note for note in convert(t5(), exclude=["*.q", "*.k"]).notes)


def test_dropout_is_noted():
    assert any("dropout of 0.3" in note for note in convert(tree(a=nn.Linear(4, 4), d=nn.Dropout(0.3))).notes)
    assert not any("dropout" in note for note in convert(tree(a=nn.Linear(4, 4), d=nn.Dropout(0))).notes)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.25, resid_pdrop=0.0)
    assert any("dropout of 0.25" in note for note in convert(transformers.GPT2Model(config)).notes)


def test_alpha_by_pattern():
    model = tree(q=nn.Linear(4, 4), k=nn.Linear(4, 4), wo=nn.Linear(4, 4))
    report = convert(model, alpha_init={"q": 0.5, "w*": "1/sqrt(2L)"}, n_layers=2, output_alpha_init=0.125)
    assert [layer.alpha_init for layer in report.converted] == [0.5, 1.0, 0.5]
    assert (model.q.alpha == 0.5).all()
    with pytest.raises(ValueError, match=r"alpha_init='v' fits no nn.Linear"):
        convert(tree(q=nn.Linear(4, 4)), alpha_init={"v": 1.0})
    with pytest.raises(ValueError, match=r"alpha_init='half' is not a named scale"):
        convert(tree(q=nn.Linear(4, 4)), alpha_init={"q": "half"})
