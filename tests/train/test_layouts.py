"""Runs whose processes form a mesh of several dimensions: who exchanges what with whom."""

import math
import re
from dataclasses import replace

import torch
from helpers_parallel import in_world
from helpers_train import TINY
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sdd.parallel import ParallelConfig
from sdd.parallel.mesh import fsdp_mesh
from sdd.train.optim import by_mesh, clip_gradients
from sdd.train.optimizers import StableAdamW

LAYOUTS = {
    "shard 4": ParallelConfig(),
    "replicate 2, shard 2": ParallelConfig(replicate=2),
    "replicate 4": ParallelConfig(replicate=4),
    "shard 2, tensor 2": ParallelConfig(tensor=2),
    "tensor 4": ParallelConfig(tensor=4),
    "replicate 2, tensor 2": ParallelConfig(replicate=2, tensor=2),
    "shard 2, context 2": ParallelConfig(context=2),
    "replicate 2, context 2": ParallelConfig(replicate=2, context=2),
    "context 2, tensor 2": ParallelConfig(context=2, tensor=2),
}
MODEL = replace(TINY.model, n_heads=4, n_kv_heads=4)


def numbers_of(world, asked):
    world = world.laid_out(asked, MODEL, torch.device("cpu"))
    mesh = None if world.mesh is None else fsdp_mesh(world.mesh)
    return {
        "layout": str(world.layout),
        "data": (world.data_rank, world.data_size),
        "sum": world.sum(10.0**world.rank),
        "of all": world.total_of_all(torch.tensor(world.rank)).item(),
        "any": world.any(world.rank == 3),
        "rows": world.share(7).tolist(),
        "fsdp": None if mesh is None else list(mesh.mesh_dim_names),
    }


def test_numbers_go_over_the_ranks_that_have_other_rows_and_flags_over_all():
    asked = list(LAYOUTS.values())
    answers = list(zip(*in_world(4, numbers_of_each, asked), strict=True))
    for name, ranks in zip(LAYOUTS, answers, strict=True):
        alike = math.prod(int(size) for size in re.findall(r"(?:context|tensor) (\d)", name))
        data = [rank // alike for rank in range(4)]
        for rank, found in enumerate(ranks):
            assert found["layout"] == name
            assert found["data"] == (data[rank], 4 // alike)
            assert found["sum"] == sum(10.0**other for other in range(4) if other % alike == rank % alike)
            assert found["of all"] == 6
            assert found["any"]
        rows = [row for found in ranks[::alike] for row in found["rows"] if row >= 0]
        assert rows == list(range(7)), "every row once"
    assert [found[0]["fsdp"] for found in answers] == [
        *(["shard"], ["replicate", "shard"], ["replicate", "shard"], ["shard"], None, ["replicate", "shard"]),
        *(["shard_context"], ["replicate", "shard_context"], ["context"]),
    ]


def numbers_of_each(world, asked):
    return [numbers_of(world, each) for each in asked]


def mixed(world, meshes):
    """Parameters of every kind, with the same numbers on any number of processes, and their gradients."""
    generator = torch.Generator().manual_seed(5)
    model = nn.ParameterDict()
    for name, shape, mesh, places in meshes:
        value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        if world.size > 1 and mesh is not None:
            value, grad = (
                distribute_tensor(each, world.mesh[mesh], places, src_data_rank=None) for each in (value, grad)
            )
        model[name] = nn.Parameter(value)
        model[name].grad = grad
    return model


KINDS = [
    ("plain", (5,), None, None),
    ("sharded", (7, 6), "shard", [Shard(0)]),
    ("by rows", (6, 4), "tensor", [Shard(0)]),
    ("by columns", (3, 8), ("shard", "tensor"), [Shard(0), Shard(1)]),
    ("copied", (2, 9), ("shard", "tensor"), [Replicate(), Shard(1)]),
]


def clipped_and_stepped(world):
    if world.size > 1:
        world = world.laid_out(ParallelConfig(tensor=2), MODEL, torch.device("cpu"))
    model = mixed(world, KINDS)
    norm = clip_gradients(model, 0.7)
    optimizer = StableAdamW(model.parameters(), lr=0.1, betas=(0.9, 0.5))
    for _ in range(2):
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad.mul_(3)  # which the second moment does not expect: the update is clipped
    found = [each for parameter in model.parameters() for each in (parameter.detach(), parameter.grad)]
    found = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in found]
    return norm.item(), torch.cat([each.flatten() for each in found]).numpy(), len(by_mesh(model.parameters()))


def test_norms_and_updates_over_mixed_placements_are_those_of_one_process():
    from sdd.train.parallel import World

    norm, values, _ = clipped_and_stepped(World())
    for our_norm, our_values, kinds in in_world(4, clipped_and_stepped):
        assert kinds == 4
        assert abs(our_norm - norm) < 1e-13 * norm
        torch.testing.assert_close(torch.tensor(our_values), torch.tensor(values), rtol=1e-12, atol=1e-12)
