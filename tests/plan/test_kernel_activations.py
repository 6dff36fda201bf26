"""What fused kernels keep for the backward pass, against the count; interpreted, on a model of two blocks."""

from dataclasses import replace

import pytest
import torch
from helpers_plan import saved_bytes, small_config

from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON
from sdd.models import LanguageModel, MoEConfig, model_presets
from sdd.placement import Norm, Placement, placements
from sdd.plan import count_activations

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="no Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted here"),
]
WITH_CTX = Placement({**placements["sdd-prenorm"].norms, "ctx": Norm()}, init="base")


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["sdd", "sdd-paper", "sdd-released", "prenorm-qk", "postnorm", "peri", "hybrid", "with ctx"]
)
def test_what_kernels_keep(name: str, bfloat16: bool) -> None:
    placement = WITH_CTX if name == "with ctx" else placements[name]
    config = small_config(placement, n_layers=2, context=24)
    with kernels.use("triton"):
        found = saved_bytes(LanguageModel(config), 1, bfloat16=bfloat16)
    count = count_activations(config, bfloat16=bfloat16)
    assert found == pytest.approx((count.kept + count.loss_kept) * config.context, rel=0.005)


@pytest.mark.parametrize("name", ["sdd", "prenorm-qk"])
def test_what_kernels_keep_of_a_mixture_of_experts(name: str) -> None:
    config = small_config(name, n_layers=2, context=24, d_ff=40, moe=MoEConfig(4, 2))
    with kernels.use("triton"):
        found = saved_bytes(LanguageModel(config), 1, bfloat16=True)
    count = count_activations(config, bfloat16=True)
    assert found == pytest.approx((count.kept + count.loss_kept) * config.context, rel=0.01)


def test_sdd_keeps_what_prenorm_with_qk_norm_keeps() -> None:
    """Both with the same fusions; what is left of the difference is one number a token and norm."""
    kept = {
        name: count_activations(replace(model_presets["1b"], placement=placements[name]), bfloat16=True).kept
        for name in ("sdd", "prenorm-qk")
    }
    assert kept["sdd"] == pytest.approx(kept["prenorm-qk"], rel=2e-4)
