"""Runs whose processes share the experts of a mixture: losses, gradients, checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_layouts import (
    assert_same_text_and_probe,
    loaded_and_saved,
    saved_by,
    stopped_and_resumed,
    train,
    unbroken,
    whole,
)
from helpers_parallel import in_world
from helpers_train import TINY, rows

from sdd.errors import UserError
from sdd.models import MoEConfig
from sdd.parallel import ParallelConfig
from sdd.parallel.experts import mixtures
from sdd.placement import placements
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer

pytestmark = pytest.mark.layouts

# auxiliary losses that are large enough to be seen, and a batch that clips
MOE = MoEConfig(8, 2, d_shared=12, balance_loss=0.5, router_z_loss=0.1)
CONFIG = replace(
    TINY,
    model=replace(TINY.model, d_ff=21, n_heads=4, n_kv_heads=2, moe=MOE, placement=placements["sdd-paper"]),
    data=replace(TINY.data, batch_size=8),
    optim=replace(TINY.optim, grad_clip=0.5),
)
# three experts a process, which do not divide further
SIX = replace(MOE, n_experts=6)
PLACEMENTS = ["sdd", "sdd-paper", "sdd-released", "prenorm-qk", "olmo2", "peri"]
LAYOUTS = {
    "expert 2": (2, ParallelConfig(expert=2), SIX),
    "expert 4": (4, ParallelConfig(expert=4), MOE),
    "shard 2, expert 2": (4, ParallelConfig(expert=2), SIX),
    "replicate 2, expert 2": (4, ParallelConfig(replicate=2, expert=2), SIX),
    "tensor 2": (2, ParallelConfig(tensor=2), SIX),
    "shard 2, tensor 2": (4, ParallelConfig(tensor=2), SIX),
    "expert 2, tensor 2": (4, ParallelConfig(expert=2, tensor=2), MOE),
    "expert 2, context 2": (4, ParallelConfig(expert=2, context=2), SIX),
    "context 2, tensor 2": (4, ParallelConfig(context=2, tensor=2), SIX),
}


def with_model(config, **changes):
    return replace(config, model=replace(config.model, **changes))


def all_to_one(trainer):
    """Let every token choose expert 0, which the first process holds: the others get nothing to compute."""
    for moe in (block.ffn for block in trainer.model.blocks):
        favour = torch.zeros(moe.router.out_features)
        favour[0] = 40.0
        moe.router.register_forward_hook(lambda _module, _args, logits, favour=favour: logits + favour)


def gradients(world, configs, dtype, out, prepare=None):
    """Of each config: held-out loss, and loss, norm and clipped gradients of a step."""
    found = {}
    for name, config in configs.items():
        trainer = Trainer(config, RunDir(out), world=world)
        trainer.model.to(dtype)
        if prepare is not None:
            prepare(trainer)
        found[name, "held-out loss"] = trainer.evaluate().loss
        loss, norm = trainer.gradients(0)
        found |= {(name, "loss"): loss.item(), (name, "norm"): norm.item()}
        for key, parameter in trainer.model.named_parameters():
            found[name, key] = whole(parameter.grad).numpy()
    return found


def assert_same(ours, alone, rel):
    assert ours.keys() == alone.keys()
    for (name, what), value in alone.items():
        expected, found = torch.as_tensor(value), torch.as_tensor(ours[name, what])
        tolerance = 1e-5 if what == "loss" else rel  # the loss of a step is float32
        assert (found - expected).norm() <= tolerance * expected.norm(), (name, what)


@pytest.mark.parametrize("name", LAYOUTS)
def test_placements_have_the_losses_and_gradients_of_one_process(tmp_path, name):
    size, layout, moe = LAYOUTS[name]
    names = PLACEMENTS if size == 2 else ["sdd-paper", "sdd-released"]
    configs = {name: with_model(CONFIG, moe=moe, placement=placements[name]) for name in names}
    alone = gradients(World(), configs, torch.float64, tmp_path)
    shared = {name: replace(config, parallel=layout) for name, config in configs.items()}
    for ours in in_world(size, gradients, shared, torch.float64, tmp_path):
        assert_same(ours, alone, 1e-10)


def test_float32_and_recomputed_blocks_give_the_gradients_of_one_process(tmp_path):
    configs = {
        "float32": CONFIG,
        "recomputed": replace(CONFIG, activation_checkpointing=True),
        "accumulated": with_model(replace(CONFIG, accumulate=8), moe=replace(MOE, balance_loss=0.0)),
        "no shared network": with_model(CONFIG, moe=replace(MOE, d_shared=0, renormalise=True)),
    }
    alone = gradients(World(), configs, torch.float32, tmp_path)
    shared = {name: replace(config, parallel=ParallelConfig(expert=2)) for name, config in configs.items()}
    for ours in in_world(2, gradients, shared, torch.float32, tmp_path):
        assert_same(ours, alone, 1e-5)


def test_experts_and_processes_without_tokens_have_gradients_of_zero(tmp_path):
    configs = {"one expert": with_model(CONFIG, moe=replace(MOE, top_k=1))}
    alone = gradients(World(), configs, torch.float64, tmp_path, all_to_one)
    stack = alone["one expert", "blocks.1.ffn.up_proj.weight"]
    assert stack[0].any()
    assert not stack[1:].any()
    shared = {name: replace(config, parallel=ParallelConfig(expert=2)) for name, config in configs.items()}
    for ours in in_world(2, gradients, shared, torch.float64, tmp_path, all_to_one):
        assert_same(ours, alone, 1e-10)


def held_parts(world, config, out):
    trainer = Trainer(config, RunDir(out), world=world)
    shapes = {}
    for name, parameter in trainer.model.named_parameters():
        part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        shapes[name] = (str(parameter.dtype), tuple(part.shape))
    return shapes, len(list(mixtures(trainer.model)))


def test_a_process_holds_its_experts_with_their_alphas(tmp_path):
    config = with_model(replace(CONFIG, parallel=ParallelConfig(expert=2)), moe=SIX)
    answers = in_world(4, held_parts, config, tmp_path)
    stacks = {
        name: shape for name, shape in answers[0][0].items() if name.endswith("up_proj.weight") and len(shape[1]) > 2
    }
    assert len(stacks) == answers[0][1] == 2
    for rank, (shapes, _) in enumerate(answers):
        for name in stacks:
            assert shapes[name] == ("torch.float32", (2 if rank < 2 else 1, 21, 32)), "three experts on two shards"
            assert shapes[name.replace("weight", "alpha")] == ("torch.float32", (3, 21))


def test_a_dense_model_has_no_experts_to_share():
    with pytest.raises(
        UserError, match=r"parallel.expert=2 shares the experts of a mixture, and this model is dense; "
    ):
        ParallelConfig(expert=2).resolved(2, TINY.model)


def test_experts_that_do_not_divide_are_refused_with_the_nearest_layout():
    model = replace(CONFIG.model, moe=SIX)
    line = (
        r"parallel.expert = 4 does not divide model.moe.n_experts=6; the nearest layout of 4 .*: --parallel.expert 2$"
    )
    with pytest.raises(UserError, match=line):
        ParallelConfig(expert=4).resolved(4, model)


# --- runs


# no more sequences than the probe looks at; few tokens of text, since a rounding may decide between two experts
RUN = replace(
    with_model(CONFIG, placement=placements["sdd"]),
    data=replace(TINY.data, batch_size=4),
    steps=8,
    eval_every=4,
    checkpoint_every=4,
    eval_sequences=9,
    probe_every=4,
    sample_tokens=5,
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that one process makes of RUN."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(World(), RUN, out)
    return out


@pytest.mark.parametrize("name", ["expert 2", "shard 2, expert 2", "expert 2, tensor 2"])
def test_a_run_is_that_of_one_process(tmp_path, alone, name):
    size, layout, _ = LAYOUTS[name]
    in_world(size, train, replace(RUN, parallel=layout), tmp_path / "run")
    for ours, theirs in zip(rows(tmp_path / "run"), rows(alone), strict=True):
        for name in theirs.keys() - {"routing", "expert_load"}:
            assert ours[name] == pytest.approx(theirs[name], rel=5e-5, abs=1e-5), name
        if "loss" in ours:
            assert ours.keys() - theirs.keys() == {"process_load", "exchanged_bytes"}
            assert 1 <= ours["process_load"] <= ours["worst_load"] + 1e-6
            # the rows of two layers, both ways and twice: at most all of them leave their process
            assert 0 < ours["exchanged_bytes"] <= 4 * 2 * (4 * 32 * 2) * 32 * 4
    assert_same_text_and_probe(tmp_path / "run", alone)


def test_a_run_goes_on_bit_for_bit_within_a_layout(tmp_path):
    config = replace(RUN, parallel=ParallelConfig(expert=2))
    ours = in_world(4, stopped_and_resumed, config, tmp_path / "run")
    theirs = in_world(4, unbroken, config, tmp_path)
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            assert np.array_equal(one[name], other[name]), name


def test_checkpoints_load_in_every_layout_bit_for_bit(tmp_path):
    out = tmp_path / "run"
    config = with_model(replace(RUN, parallel=ParallelConfig(expert=2)), moe=SIX)
    before = in_world(4, saved_by, config, out)[0]
    for size, parallel in (
        (2, {"parallel.expert": "2"}),
        (1, {"parallel.expert": "1"}),
        (4, {"parallel.expert": "2", "parallel.replicate": "2"}),
        (4, {"parallel.expert": "1", "parallel.replicate": "1", "parallel.tensor": "2"}),
        (2, {"parallel.tensor": "1"}),
        (4, {"parallel.expert": "2"}),
    ):
        if size == 1:
            answers = [loaded_and_saved(World(), out, parallel)]
        else:
            answers = in_world(size, loaded_and_saved, out, parallel)
        for found, _ in answers:
            for name in before:
                assert np.array_equal(before[name], found[name]), (size, parallel, name)
        before = answers[0][1]


def rules(world, out, parallel):
    """Two steps of every optimiser, under every rule for the lengths of weights."""
    found = {}
    for name, placement, weights in (
        ("muon", "sdd", "free"),
        ("stable-adamw", "sdd-paper", "free"),
        ("adamw", "sdd", "rows"),
        ("adamw", "sdd", "hyperball"),
    ):
        optim = replace(CONFIG.optim, name=name, weights=weights)
        config = with_model(replace(CONFIG, optim=optim, parallel=parallel), placement=placements[placement], moe=SIX)
        trainer = Trainer(config, RunDir(out), world=world)
        for step in range(2):
            trainer.train_step(step)
        values = {key: whole(p).numpy() for key, p in trainer.model.named_parameters()}
        found |= {f"{name} {placement} {weights}: {key}": value for key, value in values.items()}
    return found


@pytest.mark.parametrize("layout", [ParallelConfig(expert=2), ParallelConfig(replicate=2, expert=2)])
def test_every_optimiser_moves_shared_experts_as_whole_ones(tmp_path, layout):
    alone = rules(World(), tmp_path, ParallelConfig())
    for ours in in_world(4, rules, tmp_path, layout):
        for name, value in alone.items():
            assert np.allclose(ours[name], value, rtol=1e-3, atol=2e-5), name


def sent_in(world, config, out):
    """The bytes of a step and its loss, in float32 and in bfloat16."""
    found = []
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(replace(config, precision=precision), RunDir(out), world=world)
        loss, _ = trainer.train_step(0)
        found.append((loss.item(), trainer.router_stats.row()))
    return found


def test_rows_travel_in_the_precision_of_the_products(tmp_path):
    alone = sent_in(World(), CONFIG, tmp_path)
    (_, wide), (loss, narrow) = in_world(4, sent_in, replace(CONFIG, parallel=ParallelConfig(expert=2)), tmp_path)[0]
    assert loss == pytest.approx(alone[1][0], abs=2e-3)
    # rounding lets a few tokens choose other experts
    assert narrow["exchanged_bytes"] == pytest.approx(wide["exchanged_bytes"] / 2, rel=0.1)
