"""The memory of a GPU by part, against real models, optimisers and allocations."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_plan import CpuJob, forward, peak_bytes, small_config

from sdd.models import LanguageModel, model_presets
from sdd.models.transformer import HAS_CHUNKED_LOSS
from sdd.placement import placements
from sdd.plan import Job, Memory, count_memory
from sdd.train import OptimConfig
from sdd.train.optim import build_optimizer


def trained(job: Job) -> tuple[LanguageModel, torch.optim.Optimizer]:
    """The job's model and optimiser after a step, with gradients."""
    model = LanguageModel(job.model)
    model.checkpoint_blocks, model.chunked_loss = job.checkpoint_blocks, job.chunked_loss
    optimizer = build_optimizer(model, OptimConfig())
    forward(model, job.micro_batch, bfloat16=job.bfloat16).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", placements)
def test_weights_moments_and_gradients_are_exact(name: str, tied: bool) -> None:
    job = Job(small_config(name, tie_embeddings=tied), bfloat16=False)
    model, optimizer = trained(job)
    memory = count_memory(job)
    assert memory.weights == sum(weight.nbytes for weight in model.parameters())
    assert memory.gradients == sum(weight.grad.nbytes for weight in model.parameters() if weight.grad is not None)
    assert memory.moments == sum(value.nbytes for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("chunked", [False, True], ids=["logits", "chunked"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "vocab_size"), [("sdd", 2048), ("prenorm", 64), ("sdd-released", 64)])
def test_the_peak_of_a_step(name: str, vocab_size: int, bfloat16: bool, checkpoint: bool, chunked: bool) -> None:
    if chunked and not HAS_CHUNKED_LOSS:
        pytest.skip(f"torch {torch.__version__} has no chunked loss")
    config = replace(model_presets["nano"], n_layers=3, vocab_size=vocab_size, placement=placements[name])
    job = CpuJob(config, 1, 8, bfloat16, checkpoint, chunked)
    model, _optimizer = trained(job)
    measured = peak_bytes(lambda: forward(model, job.micro_batch, bfloat16=bfloat16).backward())
    memory = count_memory(job)
    assert memory.peak - memory.states == pytest.approx(measured, rel=0.1)
    assert memory.peak - memory.states >= 0.98 * measured, "a plan that is too small is worse than one too large"


def test_sharding_divides_all_but_the_scales() -> None:
    config = model_presets["1b"]
    one, eight = (count_memory(Job(config, gpus, 1, checkpoint_blocks=True)) for gpus in (1, 8))
    assert eight.weights == pytest.approx(one.weights / 8, rel=1e-3)
    assert eight.states == pytest.approx(one.states / 8, rel=1e-3)
    assert eight.activations == one.activations
    assert eight.copies > 0, "blocks are gathered"


def test_memory_grows_with_the_micro_batch() -> None:
    peaks = [count_memory(Job(model_presets["581m"], 8, rows, checkpoint_blocks=True)).peak for rows in (1, 2, 4, 8)]
    assert peaks == sorted(peaks)


def test_float32_with_grouped_heads_and_masks_have_no_fused_attention() -> None:
    grouped = model_presets["nano"]
    assert Job(grouped).has_fused_attention
    assert not Job(grouped, bfloat16=False).has_fused_attention
    assert not Job(grouped, document_mask=True).has_fused_attention
    assert Job(replace(grouped, n_kv_heads=4), bfloat16=False).has_fused_attention


def test_the_peak_counts_the_larger_phase() -> None:
    assert Memory(1, 2, 3, 4, 5, loss=6, block=7, norms=5).peak == 1 + 2 + 3 + 4 + 5 + 7


@pytest.mark.slow
def test_sharded_over_two_processes() -> None:
    """`sharded_memory.py` measures and compares on each of two processes, and fails if they differ."""
    script = Path(__file__).with_name("sharded_memory.py")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("compared") == 2
