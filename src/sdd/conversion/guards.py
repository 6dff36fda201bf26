"""Models that must not be redrawn in silence, and those that it is too late to convert."""

import gc
import sys
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdd.conversion.kinds import told
from sdd.errors import UserError


def refuse_trained(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise UserError for a model that shows signs of training, which new weights would destroy."""
    for module in model.modules():
        source = told(told(module, "config"), "_name_or_path", "")
        if isinstance(source, str) and source:
            _refuse(f"its config was loaded from {source!r}")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            _refuse(f"{name} has a gradient")
    if optimizer is not None and not isinstance(getattr(optimizer, "state", None), Mapping):
        raise UserError(f"optimizer is a {type(optimizer).__name__}: give the optimiser of the model, or leave it out")
    if optimizer is not None and optimizer.state:
        _refuse("its optimiser has taken steps")


def _refuse(sign: str) -> None:
    raise UserError(
        f"the model may be trained: {sign}. Converting draws new weights for every converted layer; give redraw=True "
        "if nothing of them is to be kept"
    )


def refuse_no_model(model: object) -> None:
    """Raise UserError for what is no module of Python code: a path, a state dict, a TorchScript program."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(f"the model is {what}: give a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"{_named(name)} is a TorchScript program, which has no layers: convert before that")


def refuse_compiled(model: nn.Module) -> None:
    """Raise UserError for a model in torch.compile: its layers have other names, and run without hooks."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # slow to import
    for name, module in model.named_modules():
        if compiler is not None and isinstance(module, compiler.OptimizedModule):
            raise UserError(f"{_named(name)} is in torch.compile already: convert it first, then compile it")
        if module._compiled_call_impl is not None:
            raise UserError(f"{_named(name)} is compiled already, by its compile(): convert it first, then compile it")


def _named(name: str) -> str:
    return name or "the model"


def refuse_wrapped(model: nn.Module) -> None:
    """Raise UserError for a model that is already replicated or sharded."""
    replicated = {id(module) for wrapper in _wrappers() for module in wrapper.modules()}
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) or id(module) in replicated:
            raise UserError(
                "the model is already in DistributedDataParallel, and every process would draw other weights: convert "
                "it first, then wrap it"
            )
        if isinstance(module, (FSDPModule, FullyShardedDataParallel)):
            raise UserError("the model is already sharded (fully_shard): convert it first, then shard it")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UserError(f"the model is already sharded ({name} is a DTensor): convert it first, then shard it")


def _wrappers() -> list[DistributedDataParallel]:
    """Every DistributedDataParallel of this process: a model does not know that it is in one."""
    if not torch.distributed.is_initialized():
        return []
    return [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
