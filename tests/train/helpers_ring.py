"""torch's ring attention over gloo: the CPU's flash kernel in the place of the GPU's, the rest as it is."""

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def on_cpu():
    """Have torch's dispatcher of ring attention know the CPU's kernel; returns a list that fills with its calls."""
    calls = []

    def forward(_op, args, kwargs):
        mesh, local = args[0].device_mesh, [each.to_local() for each in args[:3]]
        causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
        calls.append((mesh.mesh_dim_names, [each.placements for each in args[:3]], causal))
        found = ring._templated_ring_attention(mesh.get_group(), 2, _FORWARD, *local, is_causal=causal)
        return wrapped(found, mesh)

    def backward(_op, args, _kwargs):
        mesh, (grad, q, k, v, out, lse) = args[1].device_mesh, (each.to_local() for each in args[:6])

        def op(query, key, value, out, logsumexp, is_causal, grad_out):
            return _BACKWARD(grad_out, query, key, value, out, logsumexp, 0.0, is_causal)

        found = ring._templated_ring_attention_backward(
            mesh.get_group(), 2, op, grad, "grad_out", q, k, v, out, lse, is_causal=args[7]
        )
        return wrapped(found[:3], mesh)

    def wrapped(tensors, mesh):
        return tuple(DTensor.from_local(tensor, mesh, [Shard(2)], run_check=False) for tensor in tensors)

    ring.custom_ops[_FORWARD.default], ring.custom_ops[_BACKWARD.default] = forward, backward
    return calls
