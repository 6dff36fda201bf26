"""Models that know nothing of a probe: transformers' Llama and GPT-2, torch's own encoder, a convolution."""

import itertools
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from helpers_probing import assert_close, expected_weights, merged, parameters_of, plain_attention, rms
from torch import Tensor, nn

import sdd


class Seen:
    """Outputs, inputs and gradients of modules by hooks of its own."""

    def __init__(self, model: nn.Module, kinds: tuple[str, ...]) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if type(module).__name__ in kinds:
                module.register_forward_hook(self.hook(name), with_kwargs=True)

    def hook(self, name):
        def keep(_module, args, kwargs, output):
            y = output[0] if isinstance(output, tuple) else output
            if y.requires_grad:
                y.retain_grad()
            self.outputs[name] = y
            self.inputs[name] = args[0] if args else kwargs["hidden_states"]

        return keep

    def statistics(self, eps: dict[str, float], centred: bool = False) -> dict[str, dict[str, float]]:
        found = {
            name: {"rms": rms(y), "grad_rms": rms(y.grad)} for name, y in self.outputs.items() if y.grad is not None
        }
        for name in eps:
            x = self.inputs[name].double()
            ratio = eps[name] / (x.var(-1, correction=0) if centred else x.square().mean(-1))
            found[name] |= {"eps_ratio": ratio.mean().item(), "eps_ratio_max": ratio.max().item()}
        return found


def llama(attention: str = "sdpa", **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
        output_attentions=attention == "eager",
        initializer_range=0.3,
        **changes,
    )
    return transformers.LlamaForCausalLM(config)


def step(model, loss_of):
    """One probed SGD step: its row, and parameters and gradients around it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = parameters_of(model)
    with sdd.Probe(model, optimizer) as probe:
        loss_of(model).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return probe.latest, before, parameters_of(model), gradients


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama(checkpointing, padded):
    model = llama()
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    tokens = torch.randint(31, (3, 23), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(tokens)
    if padded:
        attended[1, -5:] = 0
    arguments = {"input_ids": tokens, "labels": tokens, "attention_mask": attended, "use_cache": False}
    other = llama("eager")
    other.load_state_dict(model.state_dict())
    seen = Seen(other, ("Linear", "LlamaRMSNorm", "Embedding", "LlamaDecoderLayer"))
    answer = other(**arguments)
    answer.loss.backward()
    norms = [name for name in seen.outputs if name.endswith("norm")]
    expected = seen.statistics(dict.fromkeys(norms, 1e-3))
    layers = [expected.pop(f"model.layers.{index}") for index in range(3)]
    streams = [seen.inputs["model.layers.0"], *(seen.outputs[f"model.layers.{index}"] for index in range(3))]
    for index, weights in enumerate(answer.attentions):
        entropies = plain_attention(weights.log().double(), weights.double())[1]
        expected[f"model.layers.{index}.self_attn"] = {"entropy": sum(entropies) / len(entropies)}

    row, *around = step(model, lambda model: model(**arguments).loss)
    for site in [name for name in row["sites"] if name.endswith("self_attn")]:
        assert math.isfinite(row["sites"][site].pop("logit_max"))
    weights = expected_weights(*around)
    weights = {
        name: {stat.replace("weight_", "alpha_") if name in norms else stat: v for stat, v in stats.items()}
        for name, stats in weights.items()
    }
    assert_close(row["sites"], merged(expected, weights), rel=5e-4)
    assert row["layers"]["rms"] == pytest.approx([rms(x) for x in streams], rel=1e-3)
    assert row["layers"]["grad_rms"][1:] == pytest.approx([layer["grad_rms"] for layer in layers], rel=1e-3)
    cosines = [nn.functional.cosine_similarity(x, y, dim=-1).mean().item() for x, y in itertools.pairwise(streams)]
    assert row["layers"]["cosine"] == pytest.approx(cosines, rel=1e-3)


def test_the_largest_logit_is_that_of_the_attention_weights():
    """Where one key is far above all others, its logit is what the softmax is steep by."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(10)
    tokens = torch.randint(31, (2, 9))
    seen = Seen(model, ("Linear",))
    row, *_ = step(model, lambda model: model(tokens, labels=tokens).loss)
    for index in range(3):
        q, k = (
            seen.outputs[f"model.layers.{index}.self_attn.{name}_proj"].detach().unflatten(-1, (-1, 4)).transpose(1, 2)
            for name in "qk"
        )
        rotary = model.model.rotary_emb(q, torch.arange(9)[None])
        q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, *rotary)
        logits = q @ k.repeat_interleave(2, 1).mT / 2
        largest = logits.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf).max().item()
        assert row["sites"][f"model.layers.{index}.self_attn"]["logit_max"] == pytest.approx(largest, rel=1e-4)


def test_a_converted_llama():
    model = llama()
    report = sdd.convert(model)
    tokens = torch.randint(31, (2, 9))
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        z = norm(model.model.embed_tokens(tokens)) @ model.model.layers[0].self_attn.q_proj.weight.T
    ratio = (1e-6 / z.square().mean(-1)).mean().item()
    row, *_ = step(model, lambda model: model(tokens, labels=tokens).loss)
    for layer in report.converted:
        assert {"rms", "grad_rms", "eps_ratio", "update_ratio", "alpha_norm"} <= row["sites"][layer.name].keys()
    assert row["sites"]["model.layers.0.self_attn.q_proj"]["eps_ratio"] == pytest.approx(ratio, rel=0.3)


def test_gpt2_whose_matrices_are_no_linear_layers():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        attn_implementation="sdpa",
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(31, (2, 9))
    seen = Seen(model, ("Conv1D", "LayerNorm", "Embedding"))
    row, *_ = step(model, lambda model: model(tokens, labels=tokens).loss)
    norms = [name for name in seen.outputs if "ln_" in name]
    assert len(norms) == 5
    expected = seen.statistics(dict.fromkeys(norms, 1e-5), centred=True)
    assert_close({name: {s: row["sites"][name][s] for s in stats} for name, stats in expected.items()}, expected)
    assert row["sites"]["transformer.h.1.attn.c_attn"]["angle"] > 0
    assert row["sites"]["transformer.h.1.attn"]["entropy"] > 0
    assert len(row["layers"]["cosine"]) == 2


def test_an_encoder_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 8)
    seen = Seen(model, ("Linear", "LayerNorm"))
    row, *_ = step(model, lambda model: model(x).square().sum())
    for name, stats in seen.statistics({"layers.0.norm1": 1e-5}, centred=True).items():
        assert_close({name: {s: row["sites"][name][s] for s in stats}}, {name: stats})
    attention = row["sites"]["layers.1.self_attn"]
    assert 0 < attention["entropy"] < math.log(5)
    assert row["sites"]["layers.1.self_attn.in_proj_weight"].keys() == {
        "weight_norm",
        "weight_grad_rms",
        "update_ratio",
        "angle",
    }
    assert len(row["layers"]["rms"]) == 3


def test_images_and_norms_over_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        y = model[0](x)
    row, _, _, gradients = step(model, lambda model: model(x).square().sum())
    assert row["sites"]["0"]["rms"] == pytest.approx(rms(y), rel=1e-4)
    assert row["sites"]["0"]["weight_grad_rms"] == pytest.approx(rms(gradients["0.weight"]), rel=1e-4)
    assert row["sites"]["1"].keys() == {"rms", "grad_rms"}
    assert row["layers"] == {}


def test_an_expert_without_tokens_has_no_statistics_of_them():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(sdd.SDDLinear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.experts[0](x) + self.experts[1](x[:0]).sum()

    row, *_ = step(Experts(), lambda model: model(torch.randn(6, 4)).square().sum())
    assert {"rms", "eps_ratio", "angle"} <= row["sites"]["experts.0"].keys()
    assert not {"rms", "eps_ratio", "grad_rms"} & row["sites"]["experts.1"].keys()
    assert row["sites"]["experts.1"]["weight_grad_rms"] == 0
    assert "weight_grad_rms" not in row["sites"]["experts.2"]
    assert row["sites"]["experts.2"]["weight_norm"] > 0


def test_frozen_and_shared_parts():
    """A frozen layer has no gradient and no update; a layer that is called twice counts twice; a tied matrix once."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.shared = nn.Linear(4, 4, bias=False)
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.shared.weight

        def forward(self, x):
            self.between = self.shared(self.frozen(x))
            self.last = self.shared(self.between)
            return self.tied(self.last)

    model = Twice()
    x = torch.randn(6, 4)
    row, *_ = step(model, lambda model: model(x).square().sum())
    assert row["sites"]["frozen"].keys() == {"rms"}
    assert row["sites"]["shared"]["rms"] == pytest.approx(rms(model.between.detach(), model.last.detach()), rel=1e-4)
    assert row["sites"]["tied"].keys() == {"rms", "grad_rms"}
