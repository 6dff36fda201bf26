"""The plan of a mixture of experts, against what torch keeps and holds."""

from dataclasses import replace

import pytest
from helpers_plan import CpuJob, forward, peak_bytes, saved_bytes, small_config

from sdd.models import LanguageModel, MoEConfig, model_presets
from sdd.placement import placements
from sdd.plan import count_activations, count_memory, find_gpu, make_plan, show_plan
from sdd.train import OptimConfig, preset
from sdd.train.optim import build_optimizer

MOE = MoEConfig(4, 2)
BATCH = 2


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", ["prenorm", "sdd", "sdd-paper", "sdd-released"])
def test_what_torch_keeps(name: str, checkpoint: bool, bfloat16: bool) -> None:
    config = small_config(name, moe=replace(MOE, d_shared=24, renormalise=True), d_ff=40)
    model = LanguageModel(config)
    model.checkpoint_blocks = checkpoint
    count = count_activations(config, checkpoint_blocks=checkpoint, bfloat16=bfloat16, kernels=False)
    expected = (count.kept + count.loss_kept) * BATCH * config.context
    assert saved_bytes(model, BATCH, bfloat16=bfloat16) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["prenorm", "sdd-released"])
def test_states_are_exact_and_the_peak_is_near(name: str, bfloat16: bool, checkpoint: bool) -> None:
    model_config = replace(
        model_presets["nano"], n_layers=3, d_ff=88, vocab_size=64, moe=MOE, placement=placements[name]
    )
    job = CpuJob(model_config, 1, 8, bfloat16, checkpoint)
    model = LanguageModel(job.model)
    model.checkpoint_blocks = checkpoint
    optimizer = build_optimizer(model, OptimConfig())

    def step() -> None:
        forward(model, job.micro_batch, bfloat16=bfloat16).backward()

    step()
    optimizer.step()
    memory = count_memory(job)
    assert memory.weights == sum(weight.nbytes for weight in model.parameters())
    assert memory.moments == sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert memory.peak - memory.states == pytest.approx(peak_bytes(step), rel=0.12)


def test_flops_are_those_of_active_parameters() -> None:
    plan = make_plan(preset("moe-1b-7b"), find_gpu("H100-SXM"), 8)
    # untied: the look-up of the embedding is no product
    assert plan.flops.matmul == 6 * (1_281_785_856 - 50_280 * 2048)
    assert plan.to_dict()["parameters"]["active"] == plan.parameters.active
    text = show_plan("moe-1b-7b", plan)
    assert f"{plan.parameters.active:,}  8 of 64 experts a block" in text
