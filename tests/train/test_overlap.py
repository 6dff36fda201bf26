"""When the parts of blocks are gathered and given up, and blocks that are compiled: the numbers stay as they are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_layouts import end_documents
from helpers_parallel import in_world
from helpers_train import UNEVEN
from torch.utils._python_dispatch import TorchDispatchMode

from sdd.errors import UserError
from sdd.models import MoEConfig
from sdd.parallel import ParallelConfig
from sdd.train import config_io
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer

MODEL = replace(UNEVEN.model, n_layers=3, d_ff=52, n_heads=4, n_kv_heads=2, vocab_size=4099)
pytestmark = pytest.mark.layouts

CONFIG = replace(UNEVEN, model=MODEL)
POLICIES = ("auto", "always", "never")


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy().copy()


class Gathers(TorchDispatchMode):
    """Inside, every all-gather of FSDP2 is noted."""

    def __init__(self, events=None):
        super().__init__()
        self.events = [] if events is None else events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather_base" in str(func):
            self.events.append("gather")
        return func(*args, **(kwargs or {}))


def steps(world, configs, out):
    """Of each config: all gathers of a pass, and held-out losses and parameters over two steps."""
    found = []
    for config in configs:
        trainer = Trainer(config, RunDir(out), world=world)
        with Gathers() as seen:
            trainer._loss(trainer._batch(0)).total.backward()
        trainer.optimizer.zero_grad()
        gathers = len(seen.events)
        values = []
        for step in range(2):
            trainer.train_step(step)
            values.append(np.array(trainer.evaluate().loss))
        types = {name: type(parameter).__name__ for name, parameter in trainer.model.named_parameters()}
        values += [whole(parameter) for parameter in trainer.model.parameters()]
        found.append((gathers, types, values))
    return found


@pytest.mark.parametrize(("size", "parallel"), [(2, ParallelConfig()), (4, ParallelConfig(tensor=2))])
def test_when_blocks_are_given_up_changes_the_traffic_and_no_number(tmp_path, size, parallel):
    configs = [replace(CONFIG, parallel=replace(parallel, reshard=policy)) for policy in POLICIES]
    for auto, always, never in in_world(size, steps, configs, tmp_path):
        assert always[0] - auto[0] == 1, "the last block is gathered once"
        assert always[0] - never[0] == MODEL.n_layers
        for other in (always, never):
            assert auto[1] == other[1], "after an evaluation every process holds its part again"
            assert all(np.array_equal(one, two) for one, two in zip(auto[2], other[2], strict=True))


def order(world, out):
    """What happens in a forward pass: a gather, or the number of the block that computes."""
    trainer = Trainer(CONFIG, RunDir(out), world=world)
    events = []
    for number, block in enumerate(trainer.model.blocks):
        block.attn.register_forward_pre_hook(lambda *_, number=number: events.append(number))
    with torch.no_grad(), Gathers(events):
        trainer._loss(trainer._batch(0))
    return events


def test_the_next_block_is_gathered_before_one_computes(tmp_path):
    for events in in_world(2, order, tmp_path):
        for number in range(MODEL.n_layers - 1):
            gathers = events[: events.index(number)].count("gather")
            assert gathers >= number + 3, "embedding and head, the blocks up to this one, and the next"


def test_a_policy_that_does_not_exist_is_one_line():
    values = config_io.to_dict(CONFIG)
    values["parallel"]["reshard"] = "sometimes"
    with pytest.raises(UserError, match=r"^parallel.reshard='sometimes' must be auto, always, never"):
        config_io.from_dict(values)


# --- compiled blocks


def compiled(world, config, out):
    """Losses and gradients of a step, as equations and compiled block by block."""
    found = []
    for compile_it in (False, True):
        torch._dynamo.reset()
        trainer = Trainer(replace(config, compile=compile_it), RunDir(out), world=world)
        end_documents(trainer)
        values = {"loss": trainer.backward(0).numpy(), "held-out": np.array(trainer.evaluate().loss)}
        found.append(values | {name: whole(p.grad) for name, p in trainer.model.named_parameters()})
    return found


ONE = replace(CONFIG, model=replace(MODEL, n_layers=1))
MIXTURE = replace(ONE, model=replace(ONE.model, d_ff=20, moe=MoEConfig(4, 2, d_shared=12, balance_loss=0.1)))
SHARED = {
    "tensor 2": (2, ONE, ParallelConfig(tensor=2)),
    "shard 2, tensor 2": (4, ONE, ParallelConfig(tensor=2)),
    "context 2": (2, ONE, ParallelConfig(context=2)),
    "context 2, documents": (2, replace(ONE, data=replace(ONE.data, document_mask=True)), ParallelConfig(context=2)),
    "expert 2": (2, MIXTURE, ParallelConfig(expert=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_compiled_blocks_that_processes_share_have_the_numbers_of_equations(tmp_path, name):
    size, config, layout = SHARED[name]
    config = replace(config, parallel=layout)
    for plain, fused in in_world(size, compiled, config, tmp_path):
        for name, expected in plain.items():
            assert np.linalg.norm(fused[name] - expected) <= 1e-5 * np.linalg.norm(expected), name
