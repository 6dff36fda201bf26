"""Bytes measured on fake tensors, against the same model with real ones."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_plan import CpuCase, KernelCase, UnfusedCase, make_case, mixture_config, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON
from sdd.models import LanguageModel, ModelConfig, model_presets
from sdd.models.transformer import HAS_CHUNKED_LOSS
from sdd.placement import SITES, Norm, Placement, Site, placements
from sdd.plan import measure
from sdd.plan.measure import PassMemory, measure_directly, measure_pass, run_pass
from sdd.train import DataConfig

with_kernels = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
precisions = pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
checkpoints = pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])


def with_real_tensors(case: CpuCase) -> PassMemory:
    with kernels.use("triton" if case.has_kernels else "composed"):
        return run_pass(LanguageModel(case.model), case)


@precisions
@checkpoints
@pytest.mark.parametrize("name", placements)
def test_fake_tensors_hold_what_real_ones_hold(name: str, checkpoint: bool, bfloat16: bool) -> None:
    case = make_case(small_config(name, n_layers=2), micro_batch=2, bfloat16=bfloat16, checkpoint=checkpoint)
    assert measure_directly(case) == with_real_tensors(case)


@precisions
@checkpoints
@pytest.mark.parametrize("name", ["prenorm", "sdd", "sdd-paper", "sdd-released"])
def test_fake_experts_hold_what_real_ones_hold(name: str, checkpoint: bool, bfloat16: bool) -> None:
    case = make_case(mixture_config(name, n_layers=2), micro_batch=2, bfloat16=bfloat16, checkpoint=checkpoint)
    assert measure_directly(case) == with_real_tensors(case)


@precisions
def test_experts_of_a_width_that_no_grouped_kernel_takes(bfloat16: bool) -> None:
    case = make_case(mixture_config("sdd", d_ff=41), bfloat16=bfloat16)
    assert measure_directly(case) == with_real_tensors(case)


@precisions
@pytest.mark.parametrize(
    "options", [{"z_loss": 0.1}, {"kind": UnfusedCase}, {"gpus": 4}], ids=["z-loss", "unfused", "sharded"]
)
def test_options_hold_what_real_tensors_hold(options: dict[str, Any], bfloat16: bool) -> None:
    case = make_case(small_config("sdd"), micro_batch=2, bfloat16=bfloat16, **options)
    model = LanguageModel(case.model)
    if case.gpus > 1 and bfloat16:  # as gathered
        model.blocks.to(torch.bfloat16)
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.data = weight.data.float()
    with kernels.use("composed"):
        assert measure_directly(case) == run_pass(model, case)


@pytest.mark.skipif(not HAS_CHUNKED_LOSS, reason="this torch has no chunked loss")
@precisions
def test_the_chunked_loss_holds_what_real_tensors_hold(bfloat16: bool) -> None:
    case = make_case(small_config("sdd"), micro_batch=2, bfloat16=bfloat16, chunked=True)
    assert measure_directly(case) == with_real_tensors(case)


@precisions
def test_a_document_mask_holds_what_real_tensors_hold(bfloat16: bool) -> None:
    case = make_case(small_config("sdd"), micro_batch=2, bfloat16=bfloat16)
    case = replace(case, run=replace(case.run, data=DataConfig(document_mask=True)))
    assert measure_directly(case) == with_real_tensors(case)


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free what Triton's interpreter holds of its last launch, in a cycle of references, before counting."""

    class Collected(measure.LiveBytes):
        def held(self, before_phase: int) -> tuple[int, int]:
            gc.collect()
            return super().held(before_phase)

    monkeypatch.setattr(measure, "LiveBytes", Collected)


def check_kernels(case: CpuCase) -> None:
    """The same is kept; while gradients are computed, real kernels also hold partial sums, a few rows wide."""
    fake, real = measure_directly(case), with_real_tensors(case)
    assert fake[:2] == real[:2]
    assert max(fake[2:]) == pytest.approx(max(real[2:]), rel=0.03)


@with_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted here")
@pytest.mark.usefixtures("collected")
@precisions
@pytest.mark.parametrize("name", ["sdd", "sdd-released", "prenorm-qk", "postnorm"])
def test_fake_kernels_keep_what_interpreted_ones_keep(name: str, bfloat16: bool) -> None:
    check_kernels(make_case(small_config(name, n_layers=1, context=12), bfloat16=bfloat16, kind=KernelCase))


@with_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted here")
@pytest.mark.usefixtures("collected")
def test_fake_kernels_of_experts_keep_what_interpreted_ones_keep() -> None:
    check_kernels(make_case(mixture_config("sdd", n_layers=1, context=12), bfloat16=True, kind=KernelCase))


@checkpoints
@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("config", [small_config("sdd"), small_config("hybrid"), mixture_config("sdd-paper")])
def test_depth_is_extrapolated_exactly(config: ModelConfig, gpus: int, checkpoint: bool) -> None:
    case = make_case(replace(config, n_layers=6), gpus, 2, bfloat16=True, checkpoint=checkpoint)
    assert measure_pass(case) == measure_directly(case)


def draw_norms() -> st.SearchStrategy[dict[Site, Norm]]:
    full, head = st.just(Norm()), st.sampled_from([Norm(), Norm(group="head"), Norm(group="head", shared_alpha=True)])
    return st.fixed_dictionaries(
        {}, optional={site: head if site in ("q", "k", "v", "ctx") else full for site in SITES}
    )


@settings(max_examples=6)
@given(draw_norms(), st.booleans(), st.booleans(), st.sampled_from([1, 2, 4]))
def test_blocks_that_differ_are_measured_too(norms: dict[Site, Norm], joint: bool, bare: bool, kv_heads: int) -> None:
    placement = Placement(
        norms,
        joint_gate_up=joint and {"gate", "up"} <= norms.keys(),
        overrides={-1: {"ffn_in": None, "attn_out": Norm()}, 1: {"attn_in": Norm()}} if bare else {},
    )
    case = make_case(small_config(placement, n_layers=8, n_kv_heads=kv_heads, context=16))
    assert measure_pass(case) == with_real_tensors(case)


@pytest.mark.parametrize("config", [small_config("sdd"), mixture_config("sdd")], ids=["dense", "experts"])
def test_activations_are_linear_in_the_batch(config: ModelConfig) -> None:
    one, two, five = (measure_directly(make_case(config, 1, rows, bfloat16=True)) for rows in (1, 2, 5))
    assert five.activations - two.activations == 3 * (two.activations - one.activations)
    assert five.copies == one.copies


@precisions
@checkpoints
def test_the_peak_holds_more_than_is_kept(checkpoint: bool, bfloat16: bool) -> None:
    found = measure_directly(make_case(small_config("sdd"), checkpoint=checkpoint, bfloat16=bfloat16))
    logits = 4 * 48 * 300
    assert min(found.loss_forward, found.loss_backward) >= found.activations + found.copies + logits


def test_checkpointing_keeps_less_and_recomputes_one_block() -> None:
    config = small_config("sdd", n_layers=8)
    kept, checkpointed = (measure_directly(make_case(config, checkpoint=flag)) for flag in (False, True))
    assert checkpointed.activations < kept.activations / 4
    assert checkpointed.blocks_backward - checkpointed.activations > kept.activations / config.n_layers


@with_kernels
def test_sdd_keeps_what_prenorm_with_qk_norm_keeps() -> None:
    """Both with the same fusions; what is left of the difference is one number a token and norm."""
    kept = {
        name: measure_pass(
            make_case(replace(model_presets["1b"], placement=placements[name]), bfloat16=True, kind=KernelCase)
        ).activations
        for name in ("sdd", "prenorm-qk")
    }
    assert kept["sdd"] == pytest.approx(kept["prenorm-qk"], rel=2e-4)
