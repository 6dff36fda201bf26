"""Output alphas of 1/sqrt(k): every sublayer so far has an equal share of a stream that is normed after additions."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_models import drawn_tokens, redraw, tiny_config

from sdd.models import LanguageModel, MoEConfig
from sdd.placement import Norm, Placement, placements

_BY_K, _ONE = Norm(alpha_init="1/sqrt(k)", eps=0.0), Norm(eps=0.0)
_OUTPUTS = {"attn_out", "ffn_out"}


def with_outputs(norm: Norm, residual: str) -> Placement:
    plain = placements["sdd"].replace_eps(0.0)
    norms = {site: norm if site in _OUTPUTS else other for site, other in plain.norms.items()}
    return replace(plain, norms=norms, residual=residual)  # pyright: ignore[reportArgumentType]


def output_alphas(model: LanguageModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith(("o_proj.alpha", "down_proj.alpha"))}


@pytest.mark.parametrize("n_layers", [1, 3, 5])
@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=3, top_k=2)], ids=["dense", "moe"])
def test_alpha_of_sublayer_k_starts_at_one_by_its_root(n_layers: int, moe: MoEConfig | None) -> None:
    model = LanguageModel(tiny_config(with_outputs(_BY_K, "x + f"), n_layers=n_layers, moe=moe))
    alphas = [alpha.detach().flatten().tolist() for alpha in output_alphas(model).values()]
    assert len(alphas) == 2 * n_layers
    for k, alpha in enumerate(alphas, 1):
        assert alpha == pytest.approx([k**-0.5] * len(alpha))


@pytest.mark.parametrize(("name", "embedding"), [("1/sqrt(k)", 1), ("1/sqrt(k+L)", 5)])
def test_the_shares_of_the_stream_are_what_the_names_promise(name: Any, embedding: int) -> None:
    placement = with_outputs(Norm(alpha_init=name, eps=0.0), "x + f")
    model = LanguageModel(tiny_config(placement, n_layers=4))
    shares = [1.0]
    for alpha in output_alphas(model).values():  # of the mean square, if what is added does not correlate
        added = float(alpha.detach().square().mean())
        shares = [share / (1 + added) for share in shares] + [added / (1 + added)]
    assert shares == pytest.approx([embedding / (8 + embedding)] + [1 / (8 + embedding)] * 8)


@pytest.mark.parametrize("seed", range(3))
def test_it_computes_what_the_residual_rule_of_equal_shares_does(seed: int) -> None:
    torch.manual_seed(seed)
    by_rule = LanguageModel(tiny_config(with_outputs(_ONE, "sqrt(k/(k+1)) x + f/sqrt(k+1)")))
    by_alpha = LanguageModel(tiny_config(with_outputs(_BY_K, "x + f")))
    redraw(by_rule)
    by_alpha.load_state_dict(by_rule.state_dict())
    with torch.no_grad():
        for k, alpha in enumerate(output_alphas(by_alpha).values(), 1):
            alpha.div_(k**0.5)
    by_rule, by_alpha = by_rule.double(), by_alpha.double()
    tokens = drawn_tokens(by_rule.config, seed=seed)
    torch.testing.assert_close(by_alpha(tokens), by_rule(tokens), rtol=1e-6, atol=1e-6)  # alphas were cut to float32
