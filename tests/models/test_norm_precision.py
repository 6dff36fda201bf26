"""Norms in bfloat16, for studies: where they round, and that nothing else does afterwards."""

import pytest
import torch
from helpers_models import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from helpers_functional import seeds
from sdd.functional import norm
from sdd.norm_precision import statistics_dtype, statistics_in
from sdd.placement import placements
from sdd.probing import Probe


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1e-6, 1e-2]))
def test_a_norm_in_bfloat16_rounds_at_every_step(seed: int, dtype: torch.dtype, eps: float) -> None:
    torch.manual_seed(seed)
    z = torch.randn(3, 16).to(dtype)
    x = z.bfloat16()
    with statistics_in(torch.bfloat16):
        y = norm(z, eps)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(placements))
def test_a_model_with_such_norms_is_about_the_same_and_leaves_the_others_alone(name: str) -> None:
    tokens = torch.randint(29, (2, 8), generator=torch.Generator().manual_seed(1))
    exact, rounded = tiny_model(name), tiny_model(name, statistics="bfloat16")
    before = exact(tokens)
    found = rounded(tokens)
    assert statistics_dtype(torch.bfloat16) == torch.float32
    torch.testing.assert_close(exact(tokens), before, rtol=0, atol=0)
    assert 1e-4 < (found - before).norm() / before.norm() < 0.1


@pytest.mark.parametrize("name", ["sdd", "sdd-released", "hybrid", "ngpt"])
def test_the_probe_measures_such_norms_in_float32(name: str) -> None:
    model, found = tiny_model(name, statistics="bfloat16"), []
    tokens = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(1))
    with Probe(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, out=found.append) as probe:
        (optimizer,) = probe._optimizers
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert any("eps_ratio" in site for site in found[0]["sites"].values())
