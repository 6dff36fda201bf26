"""sdd.param_groups: every trainable parameter once, in the group of its role."""

import warnings

import pytest
import torch
from torch import nn

from sdd import SDDLinear
from sdd.nn import RMSNorm, SDDExpertLinear
from sdd.optim_groups import param_groups, warn_if_decayed


class Model(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(3, 4))
        self.temperature = nn.Parameter(torch.ones(()))
        self.norm = RMSNorm(4)
        self.layer_norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.up = SDDLinear(4, 8)
        self.down = nn.Linear(8, 4)
        self.down.weight.requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


ROLES = {
    "matrix": ["position", "conv.weight", "up.weight"],
    "embedding": ["embed.weight"],
    "alpha": ["norm.weight", "layer_norm.weight", "up.alpha"],
    "bias": ["temperature", "layer_norm.bias", "conv.bias", "up.bias", "down.bias"],
}


def test_roles_names_and_decay():
    model = Model()
    groups = param_groups(model, 0.1, alpha_weight_decay=0.02, embedding_weight_decay=0.03)
    assert {group["role"]: group["names"] for group in groups} == ROLES
    assert [group["role"] for group in groups] == list(ROLES)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.03, 0.02, 0.0]
    parameters = dict(model.named_parameters())
    for group in groups:
        assert all(parameters[name] is p for name, p in zip(group["names"], group["params"], strict=True))


def test_v_has_a_decay_of_its_own_if_one_is_given():
    groups = {group["role"]: group for group in param_groups(Model(), 0.1, sdd_weight_decay=0.3)}
    assert (groups["sdd"]["names"], groups["sdd"]["weight_decay"]) == (["up.weight"], 0.3)
    assert groups["matrix"]["names"] == ["position", "conv.weight"]


@pytest.mark.parametrize("sdd_first", [False, True])
def test_v_that_is_an_embedding_too_is_an_embedding(sdd_first: bool):
    head, tokens = SDDLinear(4, 7, bias=False), nn.Embedding(7, 4)
    tokens.weight = head.weight
    model = nn.ModuleList([head, tokens] if sdd_first else [tokens, head])
    groups = param_groups(model, sdd_weight_decay=0.3)
    assert [group["role"] for group in groups] == ["embedding", "alpha"]


def test_defaults_decay_the_matrices_only():
    assert [group["weight_decay"] for group in param_groups(Model())] == [0.1, 0.0, 0.0, 0.0]


def test_every_trainable_parameter_stands_once():
    model = Model()
    model.again = model.up
    grouped = [id(p) for group in param_groups(model) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_an_untied_head_is_a_matrix_and_a_tied_one_an_embedding_whichever_comes_first():
    assert "head.weight" in param_groups(Model(tied=False))[0]["names"]
    model = nn.ModuleDict({"head": nn.Linear(4, 7, bias=False), "tokens": nn.Embedding(7, 4)})
    model["tokens"].weight = model["head"].weight
    assert [(group["role"], group["names"]) for group in param_groups(model)] == [("embedding", ["head.weight"])]


def test_empty_groups_are_left_out():
    assert [group["role"] for group in param_groups(nn.Linear(2, 3, bias=False))] == ["matrix"]
    assert param_groups(nn.Linear(2, 3).requires_grad_(False)) == []


def test_a_matrix_in_a_module_named_norm_is_a_matrix():
    class NormedLinear(nn.Linear):
        pass

    assert [group["role"] for group in param_groups(NormedLinear(2, 3))] == ["matrix", "bias"]


def test_adamw_decays_each_role_by_its_own():
    model = Model()
    groups = param_groups(model, 0.5, alpha_weight_decay=0.25, embedding_weight_decay=0.125)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decay = {"matrix": 0.5, "embedding": 0.125, "alpha": 0.25, "bias": 0.0}
    for role, names in ROLES.items():
        for name in names:
            torch.testing.assert_close(model.state_dict()[name], before[name] * (1 - 0.1 * decay[role]))
    assert torch.equal(model.down.weight, before["down.weight"])
    assert [group["role"] for group in optimizer.state_dict()["param_groups"]] == list(ROLES)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_alpha_decay_reaches_alpha_and_norms_only(decay):
    groups = {group["role"]: group["weight_decay"] for group in param_groups(Model(), alpha_weight_decay=decay)}
    assert groups == {"matrix": 0.1, "embedding": 0.0, "alpha": decay, "bias": 0.0}


def test_decayed_alphas_are_named_in_one_line():
    model = nn.ModuleList([Model(), SDDExpertLinear(2, 3, 4), SDDLinear(2, 4, scale=False)])
    with pytest.warns(UserWarning, match=r"decays 2 alphas of SDD layers, such as 0\.up\.alpha, .*sdd\.param_groups"):
        assert warn_if_decayed(model, torch.optim.AdamW(model.parameters())) == ["0.up.alpha", "1.alpha"]


@pytest.mark.parametrize(
    "build", [lambda m: torch.optim.AdamW(param_groups(m)), lambda m: torch.optim.SGD(m.parameters())]
)
def test_nothing_is_said_where_no_alpha_is_decayed(build):
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_if_decayed(model, build(model)) == []
