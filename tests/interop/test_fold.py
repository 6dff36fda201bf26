"""Folding gives the same function with fewer modules, and says what it did."""

import pytest
import torch
from helpers_interop import DENSE, EXPERTS, drawn_model
from helpers_models import drawn_tokens, tiny_config
from torch import nn

from sdd.interop import architecture
from sdd.interop.fold import fold
from sdd.interop.modeling_sdd import SDDConfig, SDDForCausalLM, SDDRMSNorm
from sdd.interop.ties import to_theirs
from sdd.models import LanguageModel
from sdd.models.elimination import left_out_norms


def folded(model: LanguageModel) -> tuple[SDDForCausalLM, list[str]]:
    state, fields, said = fold(to_theirs(model, "sdd"), model.config)
    theirs = SDDForCausalLM(SDDConfig(**fields)).to(model.embed.weight.dtype)
    theirs.load_state_dict(state)
    return theirs.eval(), said


def norms(theirs: nn.Module) -> int:
    return sum(isinstance(module, SDDRMSNorm) for module in theirs.modules())


@pytest.mark.parametrize("eps", [1e-6, 1e-9])
@pytest.mark.parametrize("placement", DENSE)
def test_a_folded_model_is_the_same_up_to_eps(placement: str, eps: float) -> None:
    model = drawn_model(tiny_config(architecture.placements[placement].replace_eps(eps)), dtype=torch.float64)
    theirs, _ = folded(model)
    tokens = drawn_tokens(model.config)
    with torch.no_grad():
        expected = model(tokens)
        difference = (theirs(tokens).logits - expected).abs().max() / expected.std()
    exact = 1e-6 if placement in ("lns", "ngpt") else 1e-12  # factors to float32
    assert difference < max(exact, 300 * eps)  # mean(z^2) is about 1 here, and smaller in single rows


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "moe"])
@pytest.mark.parametrize("placement", ["sdd-paper", "sdd-released", "sdd-prenorm"])
def test_the_modules_of_left_out_norms_are_gone(placement: str, moe) -> None:
    model = drawn_model(tiny_config(placement, moe=moe))
    whole = SDDForCausalLM(SDDConfig(**architecture.own_fields(model.config)))
    theirs, said = folded(model)
    networks = 1 if moe is None else moe.n_experts + 1
    gone = [site for layer in range(3) for site in left_out_norms(model.config, layer)]
    assert gone
    assert norms(whole) - norms(theirs) == sum(networks if site == "up" else 1 for site in gone)
    assert all(f"{site} (3 of 3 blocks)" in said[0] for site in gone)
    assert "kept as norms" in said[1]
    assert "attn_out" in said[1]


def test_learned_scales_fold_exactly_and_those_of_q_and_the_residual_stay() -> None:
    model = drawn_model(tiny_config("ngpt"))
    theirs, said = folded(model)
    assert theirs.config.scales == ["qk"]
    assert said[0] == "folded: scale of gate (3 of 3 blocks), scale of up (3 of 3 blocks)"
    assert said[-1] == "kept as learned scales: qk, mix"


def test_where_nothing_folds_the_way_back_stays() -> None:
    _, fields, said = fold(to_theirs(drawn_model(tiny_config("sdd")), "sdd"), tiny_config("sdd"))
    assert said[0] == "nothing folds: no norm has only SDD readers"
    assert fields == architecture.own_fields(tiny_config("sdd"))
