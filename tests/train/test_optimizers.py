"""AdamW, StableAdamW and Muon: against their formulas in float64, in runs, over processes and on the disk."""

import copy
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_parallel import in_world
from helpers_train import TINY, UNEVEN, assert_same_tensors, rows, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdd.errors import UserError
from sdd.models import LanguageModel, MoEConfig
from sdd.probing import Probe
from sdd.train import OptimConfig, config_io
from sdd.train.checkpoint import list_checkpoints
from sdd.train.optim import build_optimizer, optimizer_tensors
from sdd.train.optimizers import Muon, StableAdamW, Together, orthogonalise
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, reopen, start

NAMES = ("adamw", "stable-adamw", "muon")
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 2**31)
MIXTURE = replace(TINY.model, moe=MoEConfig(n_experts=5, top_k=2, d_shared=16))


def under(name, config=TINY, **optim):
    return replace(config, optim=replace(config.optim, name=name, **optim))


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the formulas


@given(SHAPES, SEEDS, st.floats(0, 0.99), st.floats(0, 0.999), st.floats(0, 0.3), st.integers(0, 5))
@settings(max_examples=30)
def test_stable_adamw_is_its_formula(shape, seed, beta1, beta2, decay, spike):
    p = nn.Parameter(drawn(seed, *shape))
    optimizer = StableAdamW([p], lr=0.01, betas=(beta1, beta2), eps=1e-8, weight_decay=decay)
    want, m, u = p.detach().numpy().copy(), 0.0, 0.0
    for step in range(1, 7):
        g = drawn(seed + step, *shape).numpy() * (100.0 if step == spike else 1.0)
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        m, u = beta1 * m + (1 - beta1) * g, beta2 * u + (1 - beta2) * g * g
        m_hat, u_hat = m / (1 - beta1**step), u / (1 - beta2**step)
        rate = 0.01 / max(1.0, math.sqrt(np.mean(g * g / np.maximum(u_hat, 1e-16))))
        want = want - rate * decay * want - rate * m_hat / (np.sqrt(u_hat) + 1e-8)
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-9, atol=1e-12)


@given(SEEDS)
@settings(max_examples=10)
def test_stable_adamw_is_adamw_while_gradients_stay_alike(seed):
    p, q = (nn.Parameter(drawn(seed, 4, 3)) for _ in range(2))
    stable = StableAdamW([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    plain = torch.optim.AdamW([q], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        p.grad, q.grad = drawn(seed, 4, 3), drawn(seed, 4, 3)
        stable.step()
        plain.step()
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_tensor_with_a_sudden_gradient_takes_a_small_step_and_no_other_does():
    calm, struck = (nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(2))
    optimizer = StableAdamW([calm, struck], lr=1.0, betas=(0.0, 0.999), weight_decay=0.0)
    for step in range(50):
        calm.grad = drawn(step, 3, 3).sign()
        struck.grad = calm.grad * (1000.0 if step == 49 else 1.0)
        before = calm.detach().clone(), struck.detach().clone()
        optimizer.step()
    # the second moment of the struck one is about (49 + 1e6) / 50: AdamW's last step would be 7.07 times the others
    assert (calm - before[0]).detach().abs().mean().item() == pytest.approx(1.0, rel=1e-6)
    assert (struck - before[1]).detach().abs().mean().item() == pytest.approx(1.0, rel=1e-6)


def by_svd(matrix):
    """The Newton-Schulz iterations on each singular value, which they leave in the basis of the matrix."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    s = s / max(np.linalg.norm(matrix), 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


@given(st.integers(1, 3), SHAPES, SEEDS)
@settings(max_examples=30)
def test_every_matrix_of_a_stack_is_orthogonalised_by_itself(n, shape, seed):
    stack = drawn(seed, n, *shape)
    found = orthogonalise(stack)
    for one, matrix in zip(found, stack, strict=True):
        np.testing.assert_allclose(one.numpy(), by_svd(matrix.numpy()), atol=1e-9)
        torch.testing.assert_close(orthogonalise(matrix), one)


def test_nothing_is_made_of_no_gradient():
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


@given(SHAPES, SEEDS, st.floats(0, 0.99), st.floats(0, 0.3))
@settings(max_examples=30)
def test_muon_is_its_formula(shape, seed, momentum, decay):
    p = nn.Parameter(drawn(seed, *shape))
    optimizer = Muon([p], lr=0.01, momentum=momentum, weight_decay=decay)
    want, buffer = p.detach().numpy().copy(), 0.0
    for step in range(1, 5):
        g = drawn(seed + step, *shape).numpy()
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        buffer = momentum * buffer + (1 - momentum) * g
        update = by_svd((1 - momentum) * g + momentum * buffer)
        want = want * (1 - 0.01 * decay) - 0.01 * 0.2 * math.sqrt(max(shape)) * update
        np.testing.assert_allclose(p.detach().numpy(), want, atol=1e-9)


def test_muon_is_that_of_torch_but_for_bfloat16():
    p, q = (nn.Parameter(drawn(0, 24, 40).float()) for _ in range(2))
    ours = Muon([p], lr=0.01, momentum=0.9, weight_decay=0.2)
    theirs = torch.optim.Muon([q], lr=0.01, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    start = p.detach().clone()
    for step in range(5):
        p.grad, q.grad = drawn(step, 24, 40).float(), drawn(step, 24, 40).float()
        ours.step()
        theirs.step()
    assert (p - q).norm() < 0.02 * (p - start).norm()


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"not a tensor of shape \[3\]"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_a_state_dict_goes_from_one_to_another():
    torch.manual_seed(0)
    first, second = (build_optimizer(LanguageModel(TINY.model), under("muon").optim) for _ in range(2))
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            for place, p in enumerate(group["params"]):
                p.data.fill_(0.1)
                p.grad = drawn(place, *p.shape).float()
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.data.fill_(0.1)
        optimizer.step()
    ours, theirs = optimizer_tensors(first), optimizer_tensors(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for one, other in zip(first.param_groups, second.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one["params"], other["params"], strict=True))


# --- which parameter is moved by what


@pytest.mark.parametrize("placement", ["sdd", "prenorm"])
def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest(placement):
    model = LanguageModel(replace(MIXTURE, placement=tiny(placement).model.placement, tie_embeddings=False))
    optimizer = build_optimizer(model, under("muon").optim)
    assert isinstance(optimizer, Together)
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["names"]}
    assert rules.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        by_adamw = parameter.ndim < 2 or "router" in name or name in ("embed.weight", "head.weight")
        assert (rules[name] == "adamw") == (by_adamw or "alpha" in name or "norm" in name), name
    states = Counter(name.rpartition(".")[2] for name in optimizer_tensors(optimizer))
    assert states["momentum_buffer"] + states["exp_avg"] == len(rules)


@pytest.mark.parametrize("name", NAMES)
def test_rate_and_decay_reach_every_parameter(tmp_path, name):
    trainer = Trainer(under(name, weight_decay=0.3, alpha_weight_decay=0.2), RunDir(tmp_path))
    trainer.train_step(0)
    groups = trainer.optimizer.param_groups
    assert len({group["lr"] for group in groups}) == 1
    assert {(group["role"], group["weight_decay"]) for group in groups} == {
        ("matrix", 0.3),
        ("alpha", 0.2),
        ("embedding", 0.0),
    }


@pytest.mark.parametrize("name", NAMES)
def test_v_and_alphas_have_numbers_of_their_own(tmp_path, name):
    trainer = Trainer(under(name, weight_decay=0.3, sdd_weight_decay=0.7, alpha_lr=0.25), RunDir(tmp_path))
    trainer.train_step(0)
    groups = trainer.optimizer.param_groups
    by_name = {each: group for group in groups for each in group["names"]}
    usual = by_name["embed.weight"]["lr"]
    for each, parameter in trainer.model.named_parameters():
        assert by_name[each]["lr"] == (0.25 * usual if parameter.ndim == 1 else usual), each
    v = {each for each, group in by_name.items() if group["weight_decay"] == 0.7}
    assert v == {each.replace("alpha", "weight") for each in by_name if each.endswith("alpha")}
    if name == "muon":
        assert {by_name[each]["rule"] for each in v} == {"muon"}


# --- the size of V and its turns


def turns(name, *, decay, placement="sdd", steps=60):
    """Norm and angle a step of one V by step, at a constant rate."""
    torch.manual_seed(0)
    config = under(name, tiny(placement), weight_decay=decay, lr=0.02).optim
    model = LanguageModel(replace(TINY.model, n_layers=1, vocab_size=64))
    found = []
    with Probe(model, build_optimizer(model, config), every=1, out=found.append) as probe:
        (optimizer,) = probe._optimizers
        for _ in range(steps):
            tokens = torch.randint(64, (8, 33))
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    matrices = [row["sites"]["blocks.0.attn.o_proj"] for row in found]
    return [one["weight_norm"] for one in matrices], [one["angle"] for one in matrices]


@pytest.mark.parametrize("name", NAMES)
def test_without_decay_v_grows_and_its_turns_fade_and_decay_holds_both(name):
    free_norms, free_turns = turns(name, decay=0.0)
    held_norms, held_turns = turns(name, decay=4.0)
    assert free_norms[-1] > 1.5 * held_norms[-1]
    assert np.mean(held_turns[-10:]) > 1.5 * np.mean(free_turns[-10:])


# --- in runs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", [TINY.model, MIXTURE], ids=["dense", "experts"])
def test_a_run_under_every_optimiser_resumes_bit_for_bit(tmp_path, name, model):
    config = under(name, replace(TINY, model=model, steps=6, checkpoint_every=3, probe_every=2))
    start(config, tmp_path / "whole").run()
    cut = start(config, tmp_path / "cut")
    for step in range(3):
        cut.train_step(step)
        cut.step += 1
    cut.save()
    cut.run_dir.unlock()
    reopen(tmp_path / "cut").run()
    ends = [list_checkpoints(tmp_path / run / "checkpoints")[-1] for run in ("whole", "cut")]
    assert_same_tensors(*ends)
    losses = [[row["loss"] for row in rows(tmp_path / run) if "loss" in row] for run in ("whole", "cut")]
    assert losses[0][3:] == losses[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_weight_is_rolled_back_under_every_optimiser(tmp_path, name):
    config = under(name, replace(TINY, steps=8, checkpoint_every=4, sample_tokens=0))
    start(config, tmp_path / "sound").run()
    trainer = start(config, tmp_path / "hurt")
    update = trainer.update

    def hurting():
        update()
        if trainer.step == 5 and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            with torch.no_grad():
                trainer.model.blocks[0].attn.q_proj.weight[0, 0] = math.nan

    trainer.update = hurting
    trainer.run()
    ends = [list_checkpoints(tmp_path / run / "checkpoints")[-1] for run in ("sound", "hurt")]
    assert_same_tensors(*ends)
    assert any(row.get("event") == "roll back" for row in rows(tmp_path / "hurt"))


@pytest.mark.parametrize(("before", "now"), [("adamw", "muon"), ("muon", "stable-adamw")])
def test_another_optimiser_in_mid_run_is_refused_in_one_line(tmp_path, before, now):
    trainer = start(under(before, replace(TINY, steps=2)), tmp_path / "run")
    trainer.run()
    config_io.save(under(now, replace(TINY, steps=4)), tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match=f"optim.name is {now}, the checkpoint was trained with {before}"):
        reopen(tmp_path / "run")


def test_a_config_of_an_earlier_version_is_adamw():
    values = config_io.to_dict(TINY)
    del values["optim"]["name"], values["optim"]["momentum"]
    assert config_io.from_dict(values) == TINY


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("name", "muom", "(did you mean 'muon'?)"),
        ("name", "adam", "(did you mean 'adamw'?)"),
        ("momentum", 1.0, "momentum=1.0 must be less than 1"),
        ("momentum", -0.1, "momentum=-0.1 must be between 0 and 1"),
        ("momentum", "much", "optim.momentum='much'"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(field, value, expected):
    with pytest.raises(UserError) as error:
        config_io.with_overrides(TINY, {f"optim.{field}": value})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_only_valid_names_are_taken_from_python():
    with pytest.raises(ValueError, match="choose adamw, stable-adamw or muon"):
        OptimConfig(name="sgd")  # pyright: ignore[reportArgumentType]


# --- over processes

# neither 51 rows nor 5 experts divide by two
SHARED = replace(UNEVEN, steps=8, eval_every=0, probe_every=4, sample_tokens=0)


def whole(trainer):
    tensors = dict(trainer.model.named_parameters()) | optimizer_tensors(trainer.optimizer)
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().numpy().copy()
        for name, value in tensors.items()
    }


def train(world, config, out):
    trainer = start(config, out, world)
    trainer.run()
    return whole(trainer)


def reload(world, out):
    trainer = reopen(out, steps=9, world=world)
    found = whole(trainer)
    trainer.run_dir.unlock()
    return found


@pytest.mark.parametrize(
    ("name", "experts"), [("muon", False), ("muon", True), ("stable-adamw", False)], ids=["muon", "experts", "stable"]
)
def test_two_processes_equal_one_and_load_each_others_state(tmp_path, name, experts):
    # the load balancing loss is one of a forward pass: with experts one process must make no more passes than two
    changes = {"model": replace(SHARED.model, moe=MIXTURE.moe), "accumulate": 1} if experts else {}
    config = under(name, replace(SHARED, **changes))
    one = train(World(), config, tmp_path / "one")
    two = in_world(2, train, config, tmp_path / "two")
    for row, other in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert row.get("loss", 0) == pytest.approx(other.get("loss", 0), abs=1e-5)
        assert row.get("eval_loss", 0) == pytest.approx(other.get("eval_loss", 0), abs=1e-5)
    for found in two:
        for key, value in found.items():
            np.testing.assert_array_equal(value, two[0][key], err_msg=key)
    for key in one:
        if name == "muon" and key.startswith("blocks.") and f"{key}.momentum_buffer" in one:
            assert np.abs(two[0][key] - one[key]).max() < 1e-5, key
    for key, value in reload(World(), tmp_path / "two").items():
        np.testing.assert_array_equal(value, two[0][key], err_msg=key)
    for found in in_world(2, reload, tmp_path / "one"):
        for key, value in found.items():
            np.testing.assert_array_equal(value, one[key], err_msg=key)
