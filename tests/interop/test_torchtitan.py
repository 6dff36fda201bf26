"""Placements on torchtitan's Llama 3: the same function as ours, its checkpoints, decay groups and refusals."""

import re

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torchtitan", reason="the extra torchtitan is not installed")
pytest.importorskip("spmd_types", reason="the extra torchtitan is not installed")

from helpers_torchtitan import built, drawn_placement, shake, small, tokens  # isort: skip (it imports quietly)

from torchtitan.components.lora import LoRAConverter
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.models import llama3
from torchtitan.models.common.linear import Linear

import sdd.interop.torchtitan as sdd_titan
from sdd.errors import UserError
from sdd.interop.architecture import kind_of
from sdd.interop.ties import ties, to_theirs
from sdd.models import LanguageModel
from sdd.models.init import init_std
from sdd.optim_groups import param_groups
from sdd.placement import Norm, Placement, placements

pytestmark = pytest.mark.ties

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # a model is built each time
EXPRESSIBLE = sorted(set(placements) - {"ngpt"})


@pytest.mark.parametrize("flavor", ["debugmodel", "1B", "8B"])
@pytest.mark.parametrize("placement", ["sdd", "sdd-paper", "prenorm", "keel"])
def test_a_model_has_the_parameters_of_ours_and_every_one_has_a_name_for_transformers(flavor, placement):
    spec = sdd_titan.model_registry(flavor, placement)
    shape = sdd_titan.model_config(spec.model)
    with torch.device("meta"):
        model = spec.model.build()
    ours = LanguageModel(shape, "meta")
    model.verify_module_protocol()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ours.parameters())
    theirs = spec.state_dict_adapter(spec.model, None).to_hf(dict(model.named_parameters()))
    expected = {name: value.shape for name, value in to_theirs(ours, kind_of(shape)).items()}
    assert {name: value.shape for name, value in theirs.items()} == expected


def assert_the_same(placement, seed=0):
    """The logits are ours with the same weights, and the weights survive the way there and back."""
    spec = small(placement)
    shape = sdd_titan.model_config(spec.model)
    torch.manual_seed(seed)
    ours = LanguageModel(shape)
    shake(ours)
    adapter, model = spec.state_dict_adapter(spec.model, None), built(spec.model)
    theirs = to_theirs(ours, kind_of(shape))
    model.load_state_dict(adapter.from_hf(theirs))
    with torch.no_grad():
        expected, found = ours(tokens()), model(tokens())
    assert (found - expected).abs().max() < 5e-5 * expected.std()
    back = dict(sdd_titan.language_model(spec.model, model.state_dict()).named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(back[name], parameter, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("placement", EXPRESSIBLE)
def test_the_logits_of_a_named_placement_are_ours(placement):
    assert_the_same(placement)


@settings(max_examples=5, deadline=None, phases=NO_SHRINKING)
@given(st.data(), st.integers(0, 2**31))
def test_the_logits_of_any_placement_are_ours(data, seed):
    assert_the_same(drawn_placement(data.draw, st), seed)


def test_a_checkpoint_goes_there_and_back_bit_for_bit_with_its_alphas():
    spec = small("sdd-paper")
    model = built(spec.model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = spec.state_dict_adapter(spec.model, None)
    theirs = adapter.to_hf(state)
    assert len([name for name in theirs if re.search(r"\.(q|k|v|o|gate|up|down)_norm\.", name)]) == 2 * 7
    back = adapter.from_hf(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_tied_head_is_left_out_for_transformers_and_comes_back():
    spec = sdd_titan.model_registry("1B", "sdd")
    adapter, weight = spec.state_dict_adapter(spec.model, None), torch.ones(2, 2)
    theirs = adapter.to_hf({"tok_embeddings.weight": weight, "lm_head.weight": weight})
    assert theirs.keys() == {"model.embed_tokens.weight"}
    assert adapter.from_hf(theirs).keys() == {"tok_embeddings.weight", "lm_head.weight"}


def test_a_name_that_belongs_to_nothing_is_refused():
    adapter = sdd_titan.SDDStateDictAdapter(small("prenorm").model, None)
    with pytest.raises(UserError, match=r"wo\.norm\.alpha belongs to nothing"):
        adapter.to_hf({"layers.0.attention.wo.norm.alpha": torch.ones(2)})
    with pytest.raises(UserError, match=r"o_norm\.weight belongs to nothing"):
        adapter.from_hf({"model.layers.0.self_attn.o_norm.weight": torch.ones(2)})


@pytest.mark.parametrize("placement", ["sdd-paper", "deepnorm", "hybrid"])
def test_matrices_are_drawn_by_the_rule_of_the_placement(placement):
    spec = small(placement)
    shape = sdd_titan.model_config(spec.model)
    torch.manual_seed(0)
    model = spec.model.build()
    model.init_states()
    layer = model.layers["1"]
    for role, part in (("v_proj", layer.attention.qkv_linear.wv), ("down_proj", layer.feed_forward.w2)):
        weight = getattr(part, "linear", part).weight
        std = init_std(shape, role, *reversed(weight.shape))
        assert 0.95 * std < weight.std().item() < 1.01 * std  # truncated at three


def test_scales_start_where_the_placement_says():
    model = small("sdd", n_layers=6).model.build()
    model.init_states()
    assert torch.equal(model.layers["3"].attention.wo.norm.alpha, torch.full((256,), 12**-0.5))


@pytest.mark.parametrize("placement", ["sdd", "sdd-paper", "prenorm-qk", "keel"])
def test_what_decays_is_what_decays_with_us(placement):
    spec = small(placement)
    model, adapter = built(spec.model), spec.state_dict_adapter(spec.model, None)
    config = sdd_titan.adamw(1e-3, weight_decay=0.3)
    config.implementation = "for-loop"
    groups = [
        group for optimizer in OptimizersContainer(config, model_parts=[model]) for group in optimizer.param_groups
    ]
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    ours = LanguageModel(sdd_titan.model_config(spec.model), "meta")
    expected = {
        name: group["weight_decay"] for group in param_groups(ours, weight_decay=0.3) for name in group["names"]
    }
    found = {tensor.ours: tensor.theirs for tensor in adapter.tensors}
    named = {tie.ours: tie.theirs for tie in ties(ours.config, kind_of(ours.config))}
    assert {found[name]: decay for name, decay in decays.items()} == {named[name]: d for name, d in expected.items()}


def test_scaled_rope_is_refused_where_it_would_be_another_model():
    config = sdd_titan.model_registry("debugmodel", rope_scaling="llama").model
    with pytest.raises(UserError, match="rope_scaling='llama' is not known"):
        sdd_titan.language_model(config, {})


def test_the_trainer_can_count_what_a_model_costs():
    spec = small("sdd")
    model = spec.model.build()
    n_parameters, flops = spec.model.get_nparams_and_flops(model, 64)
    assert n_parameters == sum(p.numel() for p in model.parameters())
    assert flops > 6 * sum(layer.numel() for layer in model.layers.parameters())


def test_converting_leaves_the_given_config_alone():
    stock = llama3.llama3_configs["debugmodel"](attn_backend="flex")
    before = repr(stock)
    sdd_titan.SDDConverter.Config(placement="sdd").build().convert(stock)
    assert repr(stock) == before


def stock(**changes):
    config = llama3.llama3_configs["debugmodel"](attn_backend="flex")
    for name, value in changes.items():
        setattr(config.layers[1].attention, name, value)
    return config


@pytest.mark.parametrize(
    ("placement", "config", "message"),
    [
        ("ngpt", stock, "ngpt has learned scales without a norm"),
        (Placement({}, weights="unit"), stock, "own placement has weights of unit length"),
        ("sddd", stock, "no placement 'sddd' (did you mean 'sdd'?)"),
        (Placement({"q": Norm()}, overrides={9: {"q": None}}), stock, "overrides name the blocks [9]"),
        ("sdd", lambda: stock(head_dim=32), "layers.1.attention has head_dim=32"),
        ("sdd", lambda: Linear.Config(in_features=2, out_features=2), "not for Linear.Config"),
        ("sdd", lambda: LoRAConverter.Config().build().convert(stock()), "put SDDConverter before other converters"),
    ],
)
def test_what_cannot_be_expressed_is_refused_in_one_line(placement, config, message):
    converter = sdd_titan.SDDConverter.Config(placement=placement).build()
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        converter.convert(config())
    assert "\n" not in str(refused.value)


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match="no Llama 3 flavor '9B'"):
        sdd_titan.model_registry("9B")


def test_an_alpha_that_was_cast_is_refused():
    model = built(small("sdd").model)
    norm = model.layers["0"].attention.wo.norm
    norm.to(torch.bfloat16)
    assert norm.alpha.dtype == torch.float32
    norm.alpha.data = norm.alpha.data.bfloat16()
    with pytest.raises(UserError, match="must stay float32"):
        norm(torch.ones(2, 256, dtype=torch.bfloat16))


def test_lora_after_the_converter_goes_under_the_norm():
    spec = small("sdd", converters=[LoRAConverter.Config(rank=2, target_modules=["linear"])])
    layer = built(spec.model).layers["0"].attention.wo
    torch.nn.init.normal_(layer.linear.lora_b.weight)
    with torch.no_grad():
        square = (layer(torch.randn(4, 256)) / layer.norm.alpha).square().mean(-1)
    torch.testing.assert_close(square, torch.ones(4), rtol=1e-3, atol=0)
