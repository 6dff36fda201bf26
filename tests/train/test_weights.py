"""Rules for the lengths of weights, against their equations; resumed, and shared by processes."""

from dataclasses import replace

import pytest
import torch
from helpers_parallel import in_world
from helpers_train import TINY, assert_same_tensors, little, tiny
from torch import Tensor

from sdd.errors import UserError
from sdd.models import LanguageModel, MoEConfig
from sdd.placement import placements
from sdd.train import OptimConfig, config_io
from sdd.train.optim import build_optimizer
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, reopen, start
from sdd.train.weights import WeightRule

RULES = ["unit", "rows", "hyperball"]
LR = 0.05
PROJECTION = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def under(rule: str, **changes):
    """TINY under a rule; "unit" is nGPT's."""
    config = tiny("ngpt" if rule == "unit" else "sdd", **changes)
    return config if rule == "unit" else replace(config, optim=replace(config.optim, weights=rule))


def is_projection(name: str) -> bool:
    return any(f"{role}.weight" in name for role in PROJECTION)


def stepped(rule: str, seed: int, experts: bool, weight_decay: float = 0.1) -> tuple[dict, dict, dict]:
    """Weights before a step, after AdamW's own step without decay, and after a step under the rule."""
    shape = replace(TINY.model, vocab_size=50, placement=placements["prenorm-qk"])
    shape = replace(shape, moe=MoEConfig(n_experts=3, top_k=2)) if experts else shape
    found = []
    for name, decay in (("free", 0.0), (rule, weight_decay)):
        torch.manual_seed(seed)
        model = LanguageModel(shape)
        optimizer = build_optimizer(model, OptimConfig(lr=LR, weight_decay=decay))
        rule_of = WeightRule(model, optimizer, name)
        found.append({key: p.detach().double().clone() for key, p in model.named_parameters()})
        tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        rule_of.step()
        found.append({key: p.detach().double().clone() for key, p in model.named_parameters()})
    before, plain, _, ruled = found
    return before, plain, ruled


def by_the_equation(rule: str, name: str, W: Tensor, plain: Tensor) -> Tensor:
    """One matrix after a step; `plain` is W after AdamW's."""
    if rule == "unit":
        dim = 0 if "o_proj" in name or "down_proj" in name else 1
        return plain / plain.norm(dim=dim, keepdim=True)
    if rule == "rows":
        return torch.stack([row * old.norm() / row.norm() for old, row in zip(W, plain, strict=True)])
    R, u = W.norm(), W - plain
    moved = W - LR * R * u / u.norm()
    return R * moved / moved.norm()


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_follows_the_equation_of_its_rule(rule: str, seed: int, experts: bool):
    before, plain, ruled = stepped(rule, seed, experts)
    for name, W in before.items():
        ends = rule == "unit" and name in ("embed.weight", "head.weight")
        if not ends and not is_projection(name):
            if "router" not in name and name != "head.weight":  # these decay in one run only
                torch.testing.assert_close(ruled[name], plain[name], rtol=0, atol=0, msg=name)
            continue
        stack = W.unsqueeze(0) if W.ndim == 2 else W
        for e, one in enumerate(stack):
            ours, step = (x[name] if W.ndim == 2 else x[name][e] for x in (ruled, plain))
            torch.testing.assert_close(ours, by_the_equation(rule, name, one, step), rtol=1e-4, atol=1e-6, msg=name)


def test_lengths_stay_over_many_steps_and_a_matrix_without_gradient_stays_as_it_is():
    torch.manual_seed(0)
    model = LanguageModel(replace(TINY.model, n_layers=1, vocab_size=8))
    optimizer = build_optimizer(model, OptimConfig(lr=LR))
    rule = WeightRule(model, optimizer, "hyperball")
    frozen = "blocks.0.attn.v_proj.weight"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(200):
        for name, p in model.named_parameters():
            p.grad = torch.zeros_like(p) if name == frozen else torch.randn_like(p)
        rule.step()
    for name, p in model.named_parameters():
        if is_projection(name):
            torch.testing.assert_close(p.norm(), before[name].norm(), rtol=1e-6, atol=0, msg=name)
    torch.testing.assert_close(model.get_parameter(frozen), before[frozen], rtol=1e-5, atol=0)


def test_matrices_under_a_rule_have_no_decay_and_every_parameter_stays_in_one_group():
    for name, free in (("free", {"matrix"}), ("rows", {"head.weight"}), ("unit", set())):
        model = LanguageModel(replace(TINY.model, vocab_size=8))
        optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, embedding_weight_decay=0.2))
        WeightRule(model, optimizer, name)
        names = [one for group in optimizer.param_groups for one in group["names"]]
        assert sorted(names) == sorted(key for key, _ in model.named_parameters())
        decayed = {one for group in optimizer.param_groups if group["weight_decay"] for one in group["names"]}
        assert any(map(is_projection, decayed)) == (name == "free")
        assert ("embed.weight" in decayed) == (name != "unit")
        assert free == {"matrix"} or "head.weight" not in free or "head.weight" in decayed


def test_ngpt_starts_on_the_sphere_and_stays_there(tmp_path):
    trainer = Trainer(under("unit"), RunDir(tmp_path))
    for step in range(3):
        for name, p in trainer.model.named_parameters():
            if p.ndim == 2:
                lengths = p.norm(dim=0 if "o_proj" in name or "down_proj" in name else 1)
                torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0, msg=name)
        trainer.train_step(step)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_bit_equal(tmp_path, rule: str):
    config = under(rule)
    config = replace(
        config, data=little(tmp_path / "data").data, model=replace(config.model, vocab_size=64, n_layers=1)
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(replace(config, steps=8, optim=replace(config.optim, schedule="constant")), whole).run()
    start(replace(config, steps=4, optim=replace(config.optim, schedule="constant")), parts).run()
    reopen(parts, 8).run()
    assert_same_tensors(*(run / "checkpoints" / "step-00000008" for run in (whole, parts)))


def three_steps(world, out):
    found = {}
    for rule in RULES:
        trainer = Trainer(under(rule, accumulate=2), RunDir(out), world=world)
        for step in range(3):
            trainer.train_step(step)
        for name, p in trainer.model.named_parameters():
            found[f"{rule} {name}"] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().numpy()
    return found


def test_two_processes_keep_lengths_as_one_does(tmp_path):
    alone = three_steps(World(), tmp_path)
    for ours in in_world(2, three_steps, tmp_path):
        for name, weight in ours.items():
            torch.testing.assert_close(torch.tensor(weight), torch.tensor(alone[name]), rtol=0, atol=1e-4, msg=name)


def test_a_rule_of_the_optimiser_and_one_of_the_placement_do_not_go_together():
    values = config_io.to_dict(under("unit"))
    values["optim"]["weights"] = "hyperball"
    with pytest.raises(UserError, match=r"optim\.weights=hyperball does not fit ngpt"):
        config_io.from_dict(values)
