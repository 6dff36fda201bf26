"""What torchtitan's trainer takes: the model with its sharding and its checkpoints, and the optimiser's groups."""

# pyright: reportMissingImports=false

import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.context_parallel import apply_cp_to_forward
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.models import llama3

from sdd.errors import UserError, unknown
from sdd.interop.torchtitan.adapter import SDDStateDictAdapter
from sdd.interop.torchtitan.converter import SDDConverter
from sdd.interop.torchtitan.modules import Norm
from sdd.placement import Placement

#: The names of what weight decay would shrink together with the model's output: alphas, norms and the embedding.
UNDECAYED = r"(norm\.(weight|alpha)|\.before\.weight|tok_embeddings\.weight)$"


def model_registry(
    flavor: str,
    placement: Placement | str = "sdd",
    *,
    attn_backend: str = "flex",
    rope_scaling: Literal["none", "llama"] = "none",
    converters: list[Any] | None = None,
) -> Any:
    """The `ModelSpec` of a Llama 3 with a placement, for a `Trainer.Config`.

    Args:
        flavor: a size of torchtitan's Llama 3: "debugmodel", "1B", "8B" and others.
        placement: one of `sdd.placements`, its name, or your own.
        attn_backend: as torchtitan's.
        rope_scaling: see `SDDConverter.Config`.
        converters: other converters, which come after ours.

    Raises:
        UserError: if there is no such flavor, or the placement cannot be expressed.
    """
    if flavor not in llama3.llama3_configs:
        raise unknown("Llama 3 flavor", flavor, list(llama3.llama3_configs))
    ours = SDDConverter.Config(placement=placement, rope_scaling=rope_scaling)
    spec = llama3.model_registry(flavor, attn_backend=attn_backend, converters=[ours, *(converters or ())])
    return dataclasses.replace(spec, parallelize_fn=parallelize, state_dict_adapter=SDDStateDictAdapter)


def adamw(lr: float, weight_decay: float = 0.1, **kwargs: Any) -> Any:
    """Torchtitan's optimiser config with the groups of `sdd.param_groups`: matrices and an untied head decay.

    Args:
        lr: learning rate.
        weight_decay: of the matrices.
        kwargs: other arguments of AdamW; betas are (0.9, 0.95) and eps is 1e-8, as in torchtitan.
    """
    settings = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, **kwargs}
    return OptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={**settings, "weight_decay": decay}
            )
            for pattern, decay in ((UNDECAYED, 0.0), (r".*", weight_decay))
        ]
    )


def parallelize(
    model: Any,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> Any:
    """Torchtitan's `parallelize_llama` with one difference: FSDP gathers alphas and norms of blocks in float32.

    A compiled block has a graph break at each norm, because FSDP has hooks there.

    Raises:
        UserError: if `parallelism.spmd_backend` is not "partial_dtensor", or `training.enable_cpu_offload` is on.
    """
    if parallelism.spmd_backend != "partial_dtensor":
        raise UserError(
            f"parallelism.spmd_backend={parallelism.spmd_backend} is not for SDD placements: "
            "set --parallelism.spmd_backend partial_dtensor"
        )
    if training.enable_cpu_offload:
        raise UserError("training.enable_cpu_offload is not for SDD placements: leave it out")
    if parallel_dims.cp_enabled:
        attentions = [block.attention.inner_attention for block in model.layers.values()]
        apply_cp_to_forward(attentions, parallel_dims.get_mesh("cp"))
    if parallel_dims.tp_enabled:
        model.parallelize(parallel_dims)
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        for block in model.layers.values():  # not fullgraph, because FSDP has hooks at each norm
            block.compile(backend=compile_config.backend)
    mesh = parallel_dims.get_mesh(["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"])
    for block in model.layers.values():
        _gather_wide(block, mesh)
    apply_fsdp_to_decoder(
        model,
        mesh,
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        pp_enabled=parallel_dims.pp_enabled,
        reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
        enable_symm_mem=parallelism.enable_fsdp_symm_mem,
    )
    return model


def _gather_wide(block: nn.Module, mesh: Any) -> None:
    """One FSDP group of all scales of a block, which stay float32 from all-gather to reduction."""
    norms: list[nn.Module] = [
        module for module in block.modules() if isinstance(module, Norm) and module.scale is not None
    ]
    if norms:
        policy = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(norms, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
