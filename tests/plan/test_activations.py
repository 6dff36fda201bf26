"""The count of what is kept for the backward pass, against what torch keeps."""

from dataclasses import replace
from typing import Any

import pytest
from helpers_plan import saved_bytes, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.models import LanguageModel, ModelConfig, model_presets
from sdd.placement import SITES, Norm, Placement, Site, placements
from sdd.plan import count_activations

#: Nothing is left out of the count but the loss's scalars.
MARGIN = 0.005
BATCH = 2


def check(config: ModelConfig, *, checkpoint: bool = False, **options: Any) -> None:
    model = LanguageModel(config)
    model.checkpoint_blocks = checkpoint
    count = count_activations(
        config,
        checkpoint_blocks=checkpoint,
        bfloat16=options.get("bfloat16", False),
        z_loss=options.get("z_loss", 0) > 0,
        fused_attention=options.get("fused", True),
        kernels=False,
    )
    expected = (count.kept + count.loss_kept) * BATCH * config.context
    assert saved_bytes(model, BATCH, **options) == pytest.approx(expected, rel=MARGIN)
    assert sum(count.parts.values()) == pytest.approx(count.kept)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", placements)
def test_what_torch_keeps(name: str, checkpoint: bool, bfloat16: bool) -> None:
    check(small_config(name), checkpoint=checkpoint, bfloat16=bfloat16)


@pytest.mark.parametrize("name", ["prenorm", "sdd", "sdd-paper", "sdd-released"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
def test_what_torch_keeps_of_nano(name: str, checkpoint: bool) -> None:
    check(replace(model_presets["nano"], placement=placements[name]), checkpoint=checkpoint, bfloat16=True)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options", [{"z_loss": 0.1}, {"fused": False}, {"z_loss": 0.1, "fused": False}], ids=["z-loss", "unfused", "both"]
)
def test_what_torch_keeps_with(options: dict[str, Any], bfloat16: bool) -> None:
    check(small_config("sdd"), bfloat16=bfloat16, **options)


def draw_norms() -> st.SearchStrategy[dict[Site, Norm]]:
    full, head = st.just(Norm()), st.sampled_from([Norm(), Norm(group="head"), Norm(group="head", shared_alpha=True)])
    return st.fixed_dictionaries(
        {}, optional={site: head if site in ("q", "k", "v", "ctx") else full for site in SITES}
    )


@settings(max_examples=15)
@given(draw_norms(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 2, 4]))
def test_any_placement(norms: dict[Site, Norm], joint: bool, bare: bool, checkpoint: bool, kv_heads: int) -> None:
    placement = Placement(
        norms,
        joint_gate_up=joint and {"gate", "up"} <= norms.keys(),
        overrides={-1: {"ffn_in": None, "attn_out": Norm()}} if bare else {},
    )
    check(small_config(placement, n_kv_heads=kv_heads), checkpoint=checkpoint)


def test_checkpointing_keeps_less_and_recomputes_one_block() -> None:
    config = small_config("sdd", n_layers=8)
    kept, checkpointed = (count_activations(config, checkpoint_blocks=flag, kernels=False) for flag in (False, True))
    assert checkpointed.kept < kept.kept / 4
    assert checkpointed.block > kept.kept / config.n_layers
    assert set(checkpointed.parts) == {"stream", "norms", "ends"}
    assert checkpointed.loss == pytest.approx(kept.loss)
