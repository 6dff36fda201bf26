"""The one mesh of a run: a torch DeviceMesh with the dimensions of `sdd.parallel.layout`."""

import logging

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sdd.parallel.layout import DATA, DIMENSIONS, ParallelConfig


def build_mesh(layout: ParallelConfig, device: torch.device) -> DeviceMesh:
    """The mesh of a resolved layout. Every process must call it.

    Dimensions of size 1 are left out, so that no tensor carries a placement that says nothing. `shard` stays beside
    `replicate`, because FSDP2 wants both, and where nothing else is left.
    """
    sizes = {name: getattr(layout, name) for name in DIMENSIONS}
    keep = [name for name in DIMENSIONS if sizes[name] > 1]
    if "shard" not in keep and ("replicate" in keep or not keep):
        keep = [name for name in DIMENSIONS if name in keep or name == "shard"]
    # which says, each time a norm is taken over two dimensions, that it adds up over one after the other
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return init_device_mesh(device.type, tuple(sizes[name] for name in keep), mesh_dim_names=tuple(keep))


def submesh(mesh: DeviceMesh, *names: str) -> DeviceMesh | None:
    """The part of the mesh with those of the dimensions that it has; None if it has none of them."""
    there = tuple(name for name in DIMENSIONS if name in names and name in (mesh.mesh_dim_names or ()))
    return mesh[there] if there else None


def data_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The data dimensions as one; None if all processes train on the same rows."""
    found = submesh(mesh, *DATA)
    return found if found is None or found.ndim == 1 else found._flatten("data")


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The mesh over which FSDP2 works: one dimension along which it shards, after `replicate` if there is that.

    Processes that share experts or sequences hold parts of everything else, like those of `shard`. None if there are
    no such processes.
    """
    return _after_copies(mesh, "shard", "expert", "context")


def experts_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The processes that share experts, as one dimension: those of `expert` and of `tensor`, which differ in tokens."""
    found = submesh(mesh, "expert", "tensor")
    return found if found is None or found.ndim == 1 else found._flatten("expert_tensor")


def experts_fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """`fsdp_mesh` of experts, which are cut over `experts_mesh` already."""
    return _after_copies(mesh, "shard", "context")


def _after_copies(mesh: DeviceMesh, *names: str) -> DeviceMesh | None:
    """These dimensions as one, after `replicate`, where the mesh has them."""
    parts, copies = submesh(mesh, *names), submesh(mesh, "replicate")
    if parts is not None and parts.ndim > 1:
        parts = parts._flatten("_".join(parts.mesh_dim_names or ()))
    if parts is None or copies is None:
        return parts
    return DeviceMesh._concatenate([copies, parts])
