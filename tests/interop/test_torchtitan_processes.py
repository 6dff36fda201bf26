"""A converted Llama 3 on two processes: tensor parallel as one process, and alphas float32 under bfloat16 FSDP."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchtitan", reason="the extra torchtitan is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from helpers_processes import in_processes
from helpers_torchtitan import built, small, tokens

from sdd.errors import UserError
from sdd.placement import Norm, Placement

pytestmark = pytest.mark.ties

#: Every kind of norm over cut features: full width, heads, heads that share a scale, no scale, ctx.
CUT = Placement(
    {
        "embed": Norm(),
        "q": Norm(),
        "k": Norm(group="head"),
        "v": Norm(group="head", shared_alpha=True),
        "ctx": Norm(),
        "attn_out": Norm(),
        "attn_post": Norm(),
        "gate": Norm(scale=False),
        "up": Norm(),
        "ffn_out": Norm(scale=False),
        "ffn_post": Norm(),
    }
)


def settings_of(data, tensor, backend="partial_dtensor", compiled=False):
    """The arguments of `parallelize`, and the mesh on a CPU, which torchtitan does not offer."""
    import torchtitan.distributed.parallel_dims as dims
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed.utils import set_spmd_backend

    dims.device_type = "cpu"
    set_spmd_backend(backend)
    parallelism = ParallelismConfig(
        data_parallel_shard_degree=data, tensor_parallel_degree=tensor, spmd_backend=backend
    )
    return {
        "parallel_dims": dims.ParallelDims.from_config(parallelism, data * tensor),
        "training": TrainingConfig(),
        "parallelism": parallelism,
        "compile_config": CompileConfig(enable=compiled, components=["model"], backend="eager"),
        "ac_config": None,
        "dump_folder": "",
    }


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def loss_of(model, rows):
    """Summed over tokens, because torchtitan leaves the division to its loss."""
    logits = whole(model(rows)).float()
    return F.cross_entropy(logits.flatten(0, 1), rows.roll(-1, 1).flatten(), reduction="sum") / tokens().numel(), logits


def tensor_parallel(rank, placements):
    """The largest relative error of logits and gradients, of each placement with and without sequence parallel."""
    from sdd.interop.torchtitan.sharding import set_sharding

    found = {}
    for placement in placements:
        for enable_sp in (True, False):
            spec = small(placement)
            set_sharding(spec.model, enable_sp=enable_sp)
            one, cut = built(spec.model), built(spec.model)
            cut.parallelize(settings_of(1, 2)["parallel_dims"])
            (loss, expected), (mine, logits) = loss_of(one, tokens()), loss_of(cut, tokens())
            loss.backward()
            mine.backward()
            errors = [((logits - expected).norm() / expected.norm()).item()]
            for parameter, part in zip(one.parameters(), cut.parameters(), strict=True):
                errors.append(((whole(part.grad) - parameter.grad).norm() / parameter.grad.norm()).item())
            found[getattr(placement, "name", placement), enable_sp] = max(errors)
    return found


def sharded(rank, compiled):
    """dtypes in the forward pass under torchtitan's mixed precision, and errors of gradients beside one process."""
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.models.common.linear import Linear

    from sdd.interop.torchtitan import Norm as TitanNorm
    from sdd.interop.torchtitan import parallelize

    spec = small("sdd-paper", n_layers=1)
    one, cut = built(spec.model), built(spec.model)
    loss_of(one, tokens())[0].backward()
    parallelize(cut, **settings_of(2, 1, compiled=compiled))
    seen = {}
    for module in cut.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        if not compiled and isinstance(module, (Linear, TitanNorm)):
            module.register_forward_hook(partial(note, seen, getattr(module, "scale_name", "matrix")))
    loss_of(cut, tokens().chunk(2)[rank])[0].backward()
    errors = {
        name: ((whole(part.grad) - parameter.grad).norm() / parameter.grad.norm()).item()
        for (name, parameter), part in zip(one.named_parameters(), cut.parameters(), strict=True)
    }
    assert all(parameter.dtype == torch.float32 for parameter in cut.parameters())
    return seen, errors


def note(seen, kind, module, args, output):
    """A hook: the dtypes of the parameters as the forward pass sees them."""
    seen.setdefault(kind, set()).update(parameter.dtype for parameter in module.parameters(recurse=False))


def everything(rank):
    """All answers of two processes, which take long to import torchtitan."""
    tensor = tensor_parallel(rank, ["sdd", "sdd-released", CUT])
    return {"tensor": tensor, "eager": sharded(rank, False), "compiled": sharded(rank, True)}


@pytest.fixture(scope="module")
def answers():
    return in_processes(2, everything)


def test_two_tensor_parallel_processes_are_one(answers):
    for answer in answers:
        errors = answer["tensor"]
        assert len(errors) == 6
        assert all(error < 1e-5 for error in errors.values()), errors


def test_alphas_stay_float32_under_mixed_precision(answers):
    for answer in answers:
        seen, _ = answer["eager"]
        assert (seen["alpha"], seen["matrix"]) == ({torch.float32}, {torch.bfloat16})


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_gradients_of_shared_blocks_are_those_of_the_batch(answers, kind):
    for answer in answers:
        _, errors = answer[kind]
        assert max(errors.values()) < 0.1, errors  # products are bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings: settings | {"backend": "spmd_types"}, "set --parallelism.spmd_backend partial_dtensor"),
        (lambda settings: settings | {"offload": True}, "enable_cpu_offload is not for SDD placements"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    from types import SimpleNamespace

    from sdd.interop.torchtitan import parallelize

    chosen = change({"backend": "partial_dtensor", "offload": False})
    with pytest.raises(UserError, match=message):
        parallelize(
            None,
            parallel_dims=None,
            training=SimpleNamespace(enable_cpu_offload=chosen["offload"]),
            parallelism=SimpleNamespace(spmd_backend=chosen["backend"]),
            compile_config=None,
            ac_config=None,
            dump_folder="",
        )
