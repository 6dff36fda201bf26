"""The initial values of a model: matrices, alphas, devices."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import get_args

import pytest
import torch
from helpers_models import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdd.init_rules import Draw, DrawnPart
from sdd.models import LanguageModel, ModelConfig
from sdd.placement import InitName, Norm, Placement, placements

#: std of a standard normal truncated at 3
TRUNCATED = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def seeded(config: ModelConfig, device: str | None = None) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config, device=device)
    if device == "meta":
        assert all(parameter.is_meta for parameter in model.parameters())
        model.to_empty(device="cpu")
        model.init_weights()
    return model


def matrices(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}


def scales(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 1}


def expected_std(rule: str, role: str, weight: Tensor, c: ModelConfig) -> float:
    """The table of init rules, written again."""
    d, L = c.d_model, c.n_layers
    base = 1 / math.sqrt(2.5 * d)
    xavier = math.sqrt(2 / sum(weight.shape))
    gain = 1 / math.sqrt(math.sqrt(8 * L))
    output = base / math.sqrt(2 * L)
    match rule, role:
        case "base-unit-embed", "embed":
            return 1.0
        case (("base" | "base-unit-embed"), _):
            return base
        case "base/2", _:
            return base * 0.5
        case "megatron", ("o_proj" | "down_proj"):
            return output
        case "megatron", _:
            return base
        case "normal-0.02", _:
            return 0.02
        case "1/sqrt(d)", _:
            return 1 / math.sqrt(d)
        case "1/d", _:
            return 1 / d
        case "unit", _:
            return 1.0
        case "deepnorm", ("embed" | "head"):
            return 1 / math.sqrt(d)
        case "deepnorm", ("v_proj" | "o_proj" | "up_proj" | "down_proj"):
            return gain * xavier
        case "deepnorm", ("q_proj" | "k_proj" | "gate_proj"):
            return xavier
        case _:
            raise AssertionError(f"no expectation for {rule}, {role}")


@pytest.mark.parametrize("init_scale", [1.0, 0.1])
@pytest.mark.parametrize("rule", get_args(InitName))
def test_matrices_have_the_std_of_their_rule(rule: InitName, init_scale: float):
    placement = replace(placements["sdd"], init=rule)
    config = tiny_config(placement, n_layers=2, d_model=192, d_ff=320, vocab_size=512, init_scale=init_scale)
    model = seeded(config)
    for name, weight in matrices(model).items():
        std = init_scale * expected_std(rule, name.split(".")[-2], weight, config)
        # the standard error of a std is std/sqrt(2n)
        assert weight.std().item() == pytest.approx(TRUNCATED * std, rel=4 / math.sqrt(2 * weight.numel())), name
        assert weight.mean().abs() < 4 * std / math.sqrt(weight.numel()), name
        assert 2.7 * std < weight.abs().max() <= 3 * std * (1 + 1e-6), name


def test_the_scale_of_the_init_reaches_matrices_and_not_alphas():
    for tied in (False, True):
        config = tiny_config("sdd-released", tie_embeddings=tied)
        model, small = seeded(config), seeded(replace(config, init_scale=0.1))
        torch.testing.assert_close(matrices(small), {name: 0.1 * w for name, w in matrices(model).items()})
        torch.testing.assert_close(scales(small), scales(model), rtol=0, atol=0)


def test_the_former_default_at_half_its_std_is_the_default():
    former, today = seeded(tiny_config("sdd-v1", init_scale=0.5)), seeded(tiny_config("sdd"))
    torch.testing.assert_close(former.state_dict(), today.state_dict(), rtol=0, atol=0)


@given(
    st.dictionaries(
        st.sampled_from(get_args(DrawnPart)),
        st.builds(Draw, st.none() | st.sampled_from(get_args(InitName)), st.sampled_from([0.1, 0.25, 1.0, 3.0])),
    ),
    st.sampled_from(sorted(set(placements) - {"ngpt"})),
    st.booleans(),
)
def test_draws_scale_the_numbers_of_a_part_and_leave_the_others(
    draws: dict[DrawnPart, Draw], name: str, tied: bool
) -> None:
    config = tiny_config(name, tie_embeddings=tied, n_layers=1)
    plain, drawn = (
        matrices(seeded(one)) for one in (config, replace(config, placement=replace(config.placement, draws=draws)))
    )
    for weight_name, weight in plain.items():
        first, role = weight_name.split(".")[0], weight_name.split(".")[-2]
        draw = draws.get(first, Draw())  # pyright: ignore[reportCallIssue, reportArgumentType] (others have none)
        there = expected_std(config.placement.init, role, weight, config)
        own = expected_std(draw.rule or config.placement.init, role, weight, config)
        torch.testing.assert_close(drawn[weight_name], weight * (draw.factor * own / there), msg=weight_name)
        if draw == Draw():
            torch.testing.assert_close(drawn[weight_name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Draw("Base"), "rule='Base' is not an init rule"),  # pyright: ignore[reportArgumentType]
        (lambda: Draw(factor=0.0), "factor=0.0 must be positive"),
        (lambda: replace(placements["sdd"], draws={"q": Draw()}), "draws names 'q': choose from"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_draws_that_mean_nothing_are_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize(
    "names",
    [
        list(group)
        for _, group in groupby(sorted(placements, key=lambda n: placements[n].init), lambda n: placements[n].init)
    ],
    ids="+".join,
)
def test_placements_with_one_init_rule_start_from_the_same_matrices(names: list[str]):
    models = [matrices(seeded(tiny_config(name))) for name in names]
    for other in models[1:]:
        torch.testing.assert_close(other, models[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", placements)
def test_a_model_built_on_meta_starts_from_the_same_weights(name: str):
    config = tiny_config(name)
    direct, later = seeded(config), seeded(config, "meta")
    torch.testing.assert_close(dict(later.named_parameters()), dict(direct.named_parameters()), rtol=0, atol=0)
    torch.testing.assert_close(dict(later.named_buffers()), dict(direct.named_buffers()), rtol=0, atol=0)


def test_the_default_device_decides_where_a_model_is_built():
    with torch.device("meta"):
        model = LanguageModel(tiny_config("sdd"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in LanguageModel(tiny_config("sdd")).parameters())


@pytest.mark.parametrize("L", [1, 2, 8])
@pytest.mark.parametrize("name", placements)
def test_alphas_start_where_the_tables_say(name: str, L: int):
    output = dict.fromkeys(("sdd", "sdd-v1", "sdd-released"), 1 / math.sqrt(2 * L))
    output |= {"sdd-paper": 1 / math.sqrt(L), "sdd-prenorm": 1 / math.sqrt(L)}
    for parameter_name, scale in scales(LanguageModel(tiny_config(name, n_layers=L))).items():
        outputs = parameter_name.endswith(("o_proj.alpha", "down_proj.alpha"))
        value = output.get(name, 1.0) if outputs else 1.0
        if parameter_name.endswith(("qk_scale.weight", "mix.rate.weight", "logit_scale.weight")):
            value = 1 / math.sqrt(16)
        torch.testing.assert_close(scale, torch.full_like(scale, value), msg=parameter_name)


def test_a_factor_on_alpha_and_an_override_start_where_they_say():
    norms = {"ffn_out": Norm(alpha_init="1/sqrt(2L)", alpha_factor=16.0), "final": Norm(alpha_factor=3.0)}
    model = LanguageModel(
        tiny_config(Placement(norms, overrides={-1: {"ffn_out": Norm(alpha_factor=5.0)}}), n_layers=2)
    )
    assert {name: set(scale.tolist()) for name, scale in scales(model).items()} == {
        "blocks.0.ffn.down_proj.alpha": {8.0},
        "blocks.1.ffn.down_proj.alpha": {5.0},
        "final_norm.weight": {3.0},
    }


@pytest.mark.parametrize(("shared", "sizes"), [(False, (16, 8, 8, 16)), (True, (4, 4, 4, 4))])
def test_a_norm_per_head_has_one_alpha_a_feature_or_one_for_all_heads(shared: bool, sizes: tuple[int, ...]):
    norm = Norm(group="head", shared_alpha=shared)
    model = LanguageModel(tiny_config(Placement({"q": norm, "k": norm, "v": norm, "ctx": norm}), n_layers=1))
    assert tuple(scale.numel() for scale in scales(model).values()) == sizes
