"""A model's parts on many processes (FSDP2).

Matrices are sharded, block by block, those of experts by expert. Alphas and norm weights, well under 0.1% of a model,
stay whole and float32 on every rank: they never pass the bfloat16 cast of the matrices' all-gather, and their gradients
are averaged in one all-reduce. All master weights, moments and reductions are float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sdd.models import LanguageModel
from sdd.optim_groups import param_groups
from sdd.train.parallel import World


def build_model(
    model: LanguageModel, device: torch.device, autocast_dtype: torch.dtype | None, world: World
) -> LanguageModel:
    """Give a model that was made on "meta" its storage and weights: of a world of several, this rank's part.

    Args:
        model: on "meta".
        device: where to.
        autocast_dtype: what matrices are cast to before the blocks gather them, as autocast would after it.
        world: the processes.
    """
    if world.size == 1:
        model.to_empty(device="cpu")
        model.init_weights()
        return model.to(device)
    _shard(model, device, autocast_dtype, world)
    model.to_empty(device=device)
    model.init_weights()
    return model


def _shard(model: LanguageModel, device: torch.device, autocast_dtype: torch.dtype | None, world: World) -> None:
    mesh = init_device_mesh(device.type, (world.size,))
    roles = param_groups(model)
    whole = {parameter for group in roles if group["role"] in ("alpha", "bias") for parameter in group["params"]}
    policy = MixedPrecisionPolicy(autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=whole)
    # embedding and head are gathered in float32: the look-up is no matrix product, and autocast leaves it alone
    fully_shard(model, mesh=mesh, mp_policy=replace(policy, param_dtype=None), ignored_params=whole)


def compile_model(model: LanguageModel) -> None:
    """torch.compile the model; if it is sharded, block by block, since parts are gathered in between."""
    for part in model.blocks if isinstance(model, FSDPModule) else [model]:
        part.compile()


def average_gradients(model: LanguageModel, world: World) -> None:
    """Average over ranks the gradients that FSDP does not, i.e. those of parameters that every rank holds whole."""
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    mean = world.mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def gathered(model: LanguageModel) -> Iterator[None]:
    """Hold embedding, final norm and head of a sharded model whole inside the block, and not beyond it.

    Then parts of the model other than its `forward` can be called, by all ranks alike. Without it, a forward pass that
    no backward pass follows leaves them whole.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
