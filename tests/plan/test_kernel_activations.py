"""What fused kernels keep for the backward pass, against the count; interpreted, on a model of two blocks."""

import pytest
import torch
from helpers_plan import saved_bytes, small_config

from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON
from sdd.models import LanguageModel
from sdd.placement import Norm, Placement, placements
from sdd.plan import count_activations

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="no Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted here"),
]
WITH_CTX = Placement({**placements["sdd-prenorm"].norms, "ctx": Norm()}, init="base")


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sdd", "sdd-paper", "sdd-released", "prenorm-qk", "postnorm", "peri", "with ctx"])
def test_what_kernels_keep(name: str, bfloat16: bool) -> None:
    placement = WITH_CTX if name == "with ctx" else placements[name]
    config = small_config(placement, n_layers=2, context=24)
    with kernels.use("triton"):
        found = saved_bytes(LanguageModel(config), 1, bfloat16=bfloat16)
    count = count_activations(config, bfloat16=bfloat16)
    assert found == pytest.approx((count.kept + count.loss_kept) * config.context, rel=0.005)
