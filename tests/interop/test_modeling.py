"""The exported class computes what the run computes, in all the ways in which transformers calls it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers_interop import DENSE, EXPERTS, MIXTURES, config_of, drawn_model, exported, logits
from helpers_models import drawn_tokens
from torch import Tensor, nn

import sdd.interop.huggingface  # noqa: F401
from sdd.interop import architecture, modeling_sdd
from sdd.interop.architecture import NATIVE, kind_of
from sdd.interop.modeling_sdd import SDDConfig, SDDForCausalLM
from sdd.interop.ties import ties, to_ours
from sdd.models import LanguageModel, MoEConfig
from sdd.placement import Norm, Placement, Scale, placements

ALL = [pytest.param(name, None, id=name) for name in DENSE]
ALL += [pytest.param(name, EXPERTS, id=f"{name}-moe") for name in MIXTURES]
SOME = ["sdd-released", "hybrid", "keel", "ngpt"]  # between them: joint, heads, overrides, scales
ODD = Placement(
    {
        "q": Norm(group="head"),
        "v": Norm(group="head", shared_alpha=True),
        "ctx": Norm(group="head", scale=False),
        "attn_in": Norm(depth_factor="1/sqrt(l)", alpha_factor=0.5),
        "up": Norm(alpha_init="1/sqrt(L)"),
        "ffn_out": Norm(alpha_init="1/sqrt(k)"),
        "ffn_post": Norm(scale=False),
    },
    residual="2L x + f from k=3",
    overrides={1: {"q": None, "k": Norm(), "gate": Norm()}, -1: {"attn_out": Norm(scale=False)}},
    scales={"logits": Scale(factor=2.0), "up": Scale(stored="1/sqrt(d)")},
)


def tolerance(expected: Tensor) -> float:
    """A rounding of float32 is allowed where the export multiplies a number into a weight."""
    return 3e-6 * float(expected.std())


@pytest.mark.parametrize(("placement", "moe"), ALL)
def test_every_placement_in_float64(placement: str, moe: MoEConfig | None) -> None:
    model = drawn_model(config_of(placement, moe=moe), dtype=torch.float64)
    tokens = drawn_tokens(model.config)
    with torch.no_grad():
        expected = model(tokens)
    loose = placement in ("lns", "ngpt")  # their factors are exact to float32 on both sides
    torch.testing.assert_close(
        logits(exported(model), tokens), expected, rtol=0, atol=tolerance(expected) if loose else 1e-12
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_placement_of_ones_own(seed: int, tied: bool) -> None:
    model = drawn_model(config_of(ODD, tie_embeddings=tied), seed, torch.float64)
    tokens = drawn_tokens(model.config, seed=seed)
    with torch.no_grad():
        expected = model(tokens)
    torch.testing.assert_close(logits(exported(model), tokens), expected, rtol=0, atol=tolerance(expected))


@pytest.mark.parametrize(("placement", "moe"), ALL)
def test_the_weights_come_back(placement: str, moe: MoEConfig | None) -> None:
    model = drawn_model(config_of(placement, moe=moe))
    tokens = drawn_tokens(model.config)
    back = LanguageModel(model.config).eval()
    back.load_state_dict(to_ours(exported(model).state_dict(), model.config, "sdd"))
    with torch.no_grad():
        expected = model(tokens)
        torch.testing.assert_close(back(tokens), expected, rtol=0, atol=tolerance(expected))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", NATIVE)
def test_native_classes(kind: architecture.Kind, tied: bool) -> None:
    model = drawn_model(config_of(NATIVE[kind], tie_embeddings=tied, rope_theta=10_000.0))
    assert kind_of(model.config) == kind
    tokens = drawn_tokens(model.config)
    theirs = exported(model, kind)
    with torch.no_grad():
        torch.testing.assert_close(logits(theirs, tokens), model(tokens), rtol=1e-5, atol=1e-5)
    back = to_ours(theirs.state_dict(), model.config, kind)
    assert back.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(back[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"residual": "1/sqrt(L) x + f"},
        {"overrides": {1: {"ffn_in": None}}},
        {"norms": {**placements["prenorm"].norms, "final": Norm(eps=1e-5)}},
        {"norms": {**placements["prenorm"].norms, "attn_in": Norm(depth_factor="1/sqrt(l)")}},
        {"norms": {**placements["prenorm"].norms, "embed": Norm()}},
        {"scales": {"logits": Scale()}},
    ],
    ids=["residual", "overrides", "eps", "depth", "site", "scale"],
)
def test_a_model_that_only_resembles_a_native_one_is_not_one(change: dict) -> None:
    near = dataclasses.replace(placements["prenorm"], **change)
    assert kind_of(config_of("prenorm")) == "llama"
    assert kind_of(dataclasses.replace(config_of("prenorm"), placement=near)) == "sdd"
    assert kind_of(config_of("prenorm", moe=EXPERTS)) == "sdd"


def test_a_single_block_with_norms_of_its_own_is_not_native() -> None:
    changed = dataclasses.replace(placements["prenorm"], overrides={0: {"attn_in": None}})
    assert kind_of(dataclasses.replace(config_of("prenorm", n_layers=1), placement=changed)) == "sdd"
    same = dataclasses.replace(placements["prenorm"], overrides={0: {"attn_in": Norm()}})
    assert kind_of(dataclasses.replace(config_of("prenorm", n_layers=2), placement=same)) == "llama"


def test_a_norm_that_the_class_does_not_know_is_refused() -> None:
    strange = config_of("sdd")
    strange.placement.norms["nowhere"] = Norm()  # pyright: ignore[reportArgumentType]
    with pytest.raises(architecture.UserError, match="a norm at nowhere, which the exported class does not know"):
        architecture.own_fields(strange)


def test_norms_in_another_dtype_are_refused() -> None:
    with pytest.raises(architecture.UserError, match="statistics=bfloat16 is for studies"):
        kind_of(dataclasses.replace(config_of("sdd"), statistics="bfloat16"))


def test_what_a_placement_can_say_is_what_the_export_reads() -> None:
    norm = {"group", "shared_alpha", "alpha_init", "alpha_factor", "eps", "scale", "depth_factor"}
    rest = {"norms", "name", "joint_gate_up", "residual", "init", "overrides", "source", "scales", "weights", "draws"}
    message = "teach sdd.interop.architecture and modeling_sdd the new field"
    assert {field.name for field in dataclasses.fields(Norm)} == norm, message
    assert {field.name for field in dataclasses.fields(Placement)} == rest, message
    assert {field.name for field in dataclasses.fields(Scale)} == {"init", "factor", "stored"}, message


def test_every_parameter_has_one_place() -> None:
    for placement in placements:
        found = ties(config_of(placement), "sdd")
        assert len({(tie.ours, tie.expert) for tie in found}) == len(found)


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "moe"])
def test_matrices_are_linear_layers_and_alphas_are_norms(moe: MoEConfig | None) -> None:
    theirs = exported(drawn_model(config_of("sdd-released", moe=moe)))
    for name, module in theirs.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            assert leaf == "weight"
            assert isinstance(module, nn.Linear | nn.Embedding) == (parameter.ndim == 2), name
            assert parameter.ndim == 2 or name.endswith("norm"), name


# --- how transformers calls it


@pytest.mark.parametrize("placement", [*SOME, "moe"])
def test_generating_with_a_cache_is_generating_without(placement: str) -> None:
    moe = {"placement": "sdd", "moe": EXPERTS} if placement == "moe" else {"placement": placement}
    theirs = exported(drawn_model(config_of(**moe), dtype=torch.float64))
    prompt = drawn_tokens(theirs_config(theirs), 4)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    plain = theirs.generate(prompt, use_cache=False, **options)
    assert torch.equal(theirs.generate(prompt, use_cache=True, **options), plain)
    assert plain.shape == (2, 11)


@pytest.mark.parametrize("placement", SOME)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_left_padded_batch_is_each_row_alone(placement: str, attention: str) -> None:
    theirs = exported(drawn_model(config_of(placement), dtype=torch.float64))
    theirs.set_attn_implementation(attention)
    rows = [drawn_tokens(theirs_config(theirs), length, 1, seed=length) for length in (3, 6)]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    batch = torch.cat([F.pad(row, (6 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(6) >= 6 - row.shape[1] for row in rows]).long()
    found = theirs.generate(batch, attention_mask=mask, **options)
    for row, padded in zip(rows, found, strict=True):
        assert torch.equal(theirs.generate(row, **options)[0, row.shape[1] :], padded[6:])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    scores = logits(theirs, batch, attention_mask=mask, position_ids=positions)
    for index, row in enumerate(rows):
        torch.testing.assert_close(scores[index, -row.shape[1] :], logits(theirs, row)[0])


@pytest.mark.parametrize("placement", [*SOME, "moe"])
def test_gradient_checkpointing_gives_the_same_gradients(placement: str) -> None:
    moe = {"placement": "sdd", "moe": EXPERTS} if placement == "moe" else {"placement": placement}
    theirs = exported(drawn_model(config_of(**moe), dtype=torch.float64)).train()
    tokens = drawn_tokens(theirs_config(theirs))
    found, calls = [], []
    theirs.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(checkpointing))
    for checkpointing in (False, True):
        theirs.zero_grad()
        if checkpointing:  # the name since transformers 5.20, and the one before
            getattr(theirs, "activation_checkpointing_enable", theirs.gradient_checkpointing_enable)()
        theirs(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None})
    assert calls == [False, True, True], "the second backward pass must compute the block again"
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("placement", SOME)
def test_the_gradients_are_those_of_the_run(placement: str) -> None:
    model = drawn_model(config_of(placement), dtype=torch.float64)
    theirs = exported(model)
    tokens = drawn_tokens(model.config)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    loss = theirs(tokens, labels=tokens).loss
    loss.backward()
    ours = model.embed.weight.grad
    torch.testing.assert_close(theirs.get_input_embeddings().weight.grad, ours, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("placement", "moe"), ALL)
def test_nothing_that_is_loaded_is_drawn_anew(placement: str, moe: MoEConfig | None, tmp_path) -> None:
    theirs = exported(drawn_model(config_of(placement, moe=moe)))
    theirs.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, SDDForCausalLM)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_new_model_has_each_alpha_at_its_initial_value() -> None:
    config = config_of("sdd-paper")
    theirs = SDDForCausalLM(SDDConfig(**architecture.own_fields(config)))
    alphas = {name: p for name, p in theirs.named_parameters() if name.endswith("norm.weight")}
    ours = dict(LanguageModel(config).named_parameters())
    for tie in ties(config, "sdd"):
        if tie.theirs in alphas:
            torch.testing.assert_close(alphas[tie.theirs], ours[tie.ours])


def test_hidden_states_and_attentions_are_given_when_asked_for() -> None:
    model = drawn_model(config_of("sdd"))
    theirs = exported(model)
    theirs.set_attn_implementation("eager")
    tokens = drawn_tokens(model.config)
    out = theirs(tokens, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == model.config.n_layers + 1
    assert torch.equal(out.hidden_states[-1], theirs.model(tokens).last_hidden_state)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 12))
    assert theirs(tokens).hidden_states is None


def test_what_a_serving_engine_passes_reaches_the_attention() -> None:
    seen = []

    def attention(module, q, k, v, mask, **options):
        seen.append((module.layer_idx, options["of_the_engine"], options["scaling"]))
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None

    transformers.AttentionInterface.register("engine", attention)
    model = drawn_model(config_of("sdd"))
    theirs = exported(model)
    theirs.set_attn_implementation("engine")
    tokens = drawn_tokens(model.config)
    with torch.no_grad():
        hidden = theirs.model(tokens, use_cache=False, of_the_engine=7, return_dict=False)[0]
        torch.testing.assert_close(theirs.lm_head(hidden), model(tokens))
    assert seen == [(layer, 7, 0.5) for layer in range(model.config.n_layers)]


def theirs_config(theirs: transformers.PreTrainedModel):
    return config_of("sdd", vocab_size=theirs.config.vocab_size)


@pytest.mark.parametrize(
    ("named", "given", "expected", "left"),
    [
        ("cache", {"cache": 1}, 1, {}),
        ("cache", {}, None, {}),
        ("past_key_values", {"cache": 1}, None, {"cache": 1}),  # continuous batching's, for the attention function
    ],
)
def test_the_cache_is_taken_by_the_name_that_this_transformers_has(named, given, expected, left, monkeypatch) -> None:
    monkeypatch.setattr(modeling_sdd, "CACHE", named)
    assert modeling_sdd.given_cache(None, given) == expected
    assert given == left
    assert modeling_sdd.given_cache(2, {}) == 2  # by the older name, which every version takes


def test_the_cache_goes_in_and_comes_out_by_every_name_there_is() -> None:
    model = drawn_model(config_of("sdd"))
    theirs, tokens = exported(model).eval(), drawn_tokens(model.config)
    names = {"past_key_values", modeling_sdd.CACHE}
    with torch.no_grad():
        whole = theirs(tokens, use_cache=False).logits
        for name in names:
            first = theirs(tokens[:, :-1], use_cache=True)
            found = theirs(tokens[:, -1:], **{name: getattr(first, modeling_sdd.CACHE)}).logits
            assert (found[:, -1] - whole[:, -1]).abs().max() < 1e-5 * whole.std()


def test_a_mask_that_is_longer_than_what_there_is_is_refused() -> None:
    """Without it, an argument that transformers renames would be a cache that is never read, in silence."""
    model = drawn_model(config_of("sdd"))
    theirs, tokens = exported(model), drawn_tokens(model.config)
    with pytest.raises(ValueError, match="neither the inputs nor the cache hold: give the cache"):
        theirs(tokens[:, -1:], attention_mask=torch.ones_like(tokens))
