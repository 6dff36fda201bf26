"""Run by torchrun: the memory of a model that FSDP2 shards, against the plan's arithmetic."""

from dataclasses import replace

import torch
from helpers_plan import CpuJob, forward, peak_bytes
from torch import Tensor
from torch.distributed.tensor import DTensor

from sdd.models import LanguageModel, model_presets
from sdd.plan import count_memory
from sdd.train import OptimConfig
from sdd.train.optim import build_optimizer
from sdd.train.parallel import World, joined
from sdd.train.sharding import build_model


def nbytes(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def compare(job: CpuJob, world: World) -> None:
    model = LanguageModel(job.model, device="meta")
    model.checkpoint_blocks = job.checkpoint_blocks
    model = build_model(model, torch.device("cpu"), torch.bfloat16 if job.bfloat16 else None, world)
    optimizer = build_optimizer(model, OptimConfig())

    def step() -> None:
        forward(model, job.micro_batch, bfloat16=job.bfloat16).backward()

    step()
    optimizer.step()
    step()
    measured, memory = peak_bytes(step), count_memory(job)
    assert memory.weights == sum(map(nbytes, model.parameters()))
    assert memory.moments == sum(nbytes(value) for state in optimizer.state.values() for value in state.values())
    assert abs((memory.peak - memory.states) / measured - 1) < 0.1, (job, memory, measured)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as world:
        shape = replace(model_presets["nano"], n_layers=6, d_model=128, d_ff=512, vocab_size=512)
        for bfloat16 in (False, True):
            for checkpoint in (False, True):
                compare(CpuJob(shape, world.size, 8, bfloat16, checkpoint), world)
        print("compared", flush=True)
