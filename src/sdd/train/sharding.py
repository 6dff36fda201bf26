"""One model shared by the processes of a run's mesh: cut over `tensor` and `expert`, then sharded by FSDP2.

Matrices are sharded block by block, those of experts by expert. What is cut over `expert` is sharded over the other
data dimensions only, as a unit of its own in each block. Alphas and norm weights, well under 0.1% of a model,
stay whole and float32 on every rank. So the bfloat16 cast of the matrices' all-gather never touches them, and their
gradients are averaged in one all-reduce. All master weights, moments and reductions are float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sdd.models import LanguageModel
from sdd.optim_groups import param_groups
from sdd.parallel.context import share_sequences
from sdd.parallel.experts import complete_gradients, cut_experts, mixtures
from sdd.parallel.language_model import parallelize
from sdd.parallel.mesh import experts_fsdp_mesh, experts_mesh, fsdp_mesh, submesh
from sdd.train.parallel import World


def build_model(
    model: LanguageModel, device: torch.device, autocast_dtype: torch.dtype | None, world: World
) -> LanguageModel:
    """Give a model that was made on "meta" its storage and weights; with several processes, only this rank's part.

    Args:
        model: on "meta".
        device: the device of its storage.
        autocast_dtype: matrices are cast to it before the blocks gather them, as autocast would do afterwards.
        world: the processes.
    """
    shard_model(model, autocast_dtype, world)
    model.to_empty(device=device if world.size > 1 else "cpu")
    model.init_weights()
    return model.to(device)


def shard_model(model: LanguageModel, autocast_dtype: torch.dtype | None, world: World) -> None:
    """Cut a model among the processes, in place: without storage ("meta"), or with weights that all of them have."""
    if world.mesh is None or world.layout is None:
        return
    mesh = world.mesh
    if (tensor := submesh(mesh, "tensor")) is not None:
        parallelize(model, tensor)
    if model.config.moe is not None and experts_mesh(mesh) is not None:
        cut_experts(model, mesh)
    if (context := submesh(mesh, "context")) is not None:
        share_sequences(model, context, ring=world.layout.rings)
    if fsdp_mesh(mesh) is None:
        return
    _shard(model, autocast_dtype, mesh, world.layout.reshard)
    if context is not None:
        _add_up(model, world.data_size)


def _shard(model: LanguageModel, autocast_dtype: torch.dtype | None, mesh: DeviceMesh, reshard: str) -> None:
    roles = param_groups(model)
    whole = {parameter for group in roles if group["role"] in ("alpha", "bias") for parameter in group["params"]}
    wide = None if autocast_dtype is None else torch.float32  # None: the dtype of the weights, at least float32
    policy = MixedPrecisionPolicy(autocast_dtype, reduce_dtype=wide, cast_forward_inputs=False)
    of_all, of_experts = fsdp_mesh(mesh), experts_fsdp_mesh(mesh)
    for number, block in enumerate(model.blocks, 1):
        again = reshard == "always" or (reshard == "auto" and number < len(model.blocks))
        options = {"mp_policy": policy, "reshard_after_forward": again}
        for group in [moe.group for moe in mixtures(block)]:
            if of_experts is not None:
                fully_shard(group, mesh=of_experts, ignored_params=whole, **options)
            whole |= set(group.parameters())  # those outside leave them alone
        fully_shard(block, mesh=of_all, ignored_params=whole, **options)
    # embedding and head are gathered in float32: autocast leaves the look-up alone, as it is not a matrix product
    fully_shard(model, mesh=of_all, mp_policy=replace(policy, param_dtype=None), ignored_params=whole)
    # the next block is gathered while one computes; FSDP2 does so by itself in the backward pass alone
    for part, following in pairwise([model, *model.blocks]):
        cast("FSDPModule", part).set_modules_to_forward_prefetch([cast("FSDPModule", following)])


def _add_up(model: LanguageModel, data_size: int) -> None:
    """Have FSDP divide sums of gradients by the data ranks alone: ranks of `context` hold summands of a gradient."""
    for module in (model, *model.blocks):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(data_size)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it adds


def compile_model(model: LanguageModel) -> None:
    """torch.compile the model. A shared model is compiled block by block, since parts are gathered in between."""
    shared = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    for part in model.blocks if shared else [model]:
        part.compile()


def average_gradients(model: LanguageModel, world: World) -> None:
    """Make gradients the mean over data ranks where FSDP does not: of experts cut over ranks, of whole parameters.

    Ranks that share the rows of a batch hold parts of such a gradient: each has that of its own tokens and features.
    """
    if world.size == 1:
        return
    complete_gradients(model, world.data_size)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if not gradients:  # a placement without any alpha or norm weight
        return
    mean = world.total_of_all(torch.cat([gradient.flatten() for gradient in gradients])) / world.data_size
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def gathered(model: LanguageModel) -> Iterator[None]:
    """Context in which every rank holds the whole embedding, final norm and head of a sharded model.

    So all ranks can call parts of the model other than its `forward`. Afterwards each rank holds its part again, of
    blocks too: a forward pass that no backward pass follows would leave some of them whole.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
