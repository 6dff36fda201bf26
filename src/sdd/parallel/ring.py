"""torch's ring attention over processes that share sequences: keys and values of one piece after another pass through.

Process i of P has the pieces i and 2P-1-i of each sequence, which is how torch's own load balancing cuts them. Its
`scaled_dot_product_attention` of DTensors then attends piece by piece and merges by the logsumexp of each, forward and
backward. No process holds the keys and values of all tokens in the order of the sequence, and there is no mask.

This has never run on GPUs. The tests run torch's ring over gloo, with flash attention's kernel for CPUs in the place of
that for GPUs.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sdd.errors import UserError
from sdd.models.config import ModelConfig
from sdd.parallel.layout import ParallelConfig

#: Where torch 2.11 to 2.14 have it, and a shorter path that older code imports.
_PLACES = ("_context_parallel", "_context_parallel._attention", "_attention")
_NAMES = ("_ContextParallel", "_cp_options", "_enable_context_parallel_dispatcher", "set_rotate_method")
_WIDEST_HEAD = 256  # of flash attention


class RingAttention(nn.Module):
    """Causal `softmax(q k^T / sqrt(D)) v` of the tokens of all processes, by torch's ring.

    Importing torch's ring and asking for it here has attention of DTensors that are cut along their tokens, in the
    whole process, computed by rings from here on. Nothing else in `sdd` computes such attention.

    Args:
        mesh: of the processes, one dimension.

    Raises:
        UserError: if this torch has no ring attention.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        ring = _torchs_ring()
        ring._cp_options.enable_load_balance = True  # two pieces a process, as `ContextSplit` cuts sequences
        ring.set_rotate_method("alltoall")  # torch's default gathers all keys and values, which is no ring
        ring._enable_context_parallel_dispatcher()
        kind = ring._ContextParallel.AttentionType.SDPA
        parallelize_module(self, mesh, ring._ContextParallel(seq_dim=2, attention_type=kind))

    def forward(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        """`[B, H, T, D]` of this process's T tokens, from their queries, keys and values.

        torch's hooks make DTensors of plain tensors before, and plain ones after.
        """
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=q_BHTD.shape[1] != k_BKTD.shape[1]
            )


def check_ring(
    layout: ParallelConfig, model: ModelConfig, device: torch.device, autocast_dtype: torch.dtype | None
) -> None:
    """Check that what a layout asks for can run here.

    Raises:
        UserError: if it asks for ring attention, and the device, the precision, the model or this torch has none.
    """
    if not layout.rings:
        return
    asked = "parallel.context_attention=ring"
    if device.type != "cuda":
        raise UserError(f"{asked} runs on CUDA GPUs alone, and this run is on {device.type}: choose gather")
    if autocast_dtype is None:
        raise UserError(f"{asked} runs flash attention, which has no float32: choose gather, or precision=bfloat16")
    if model.head_dim > _WIDEST_HEAD:
        raise UserError(f"{asked} takes heads of at most {_WIDEST_HEAD} features, not {model.head_dim}: choose gather")
    _torchs_ring()


def _torchs_ring() -> Any:
    """The module of torch with the names that are needed here; they are private, and have moved before."""
    for place in _PLACES:
        try:
            found = import_module(f"torch.distributed.tensor.experimental.{place}")
        except ImportError:
            continue
        if all(hasattr(found, name) for name in _NAMES):
            return found
    raise UserError(
        f"parallel.context_attention=ring: torch {torch.__version__} has no ring attention that is known here (2.11 to "
        "2.14 have): choose gather"
    )
