"""Exports that transformers cuts over two processes by the plan in their config: the same logits and gradients."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from helpers_interop import DENSE, EXPERTS, MIXTURES, config_of, drawn_model, exported
from helpers_processes import in_processes

from sdd.interop.architecture import own_fields
from sdd.interop.modeling_sdd import SDDForCausalLM
from sdd.placement import Norm, Placement, placements

pytestmark = pytest.mark.ties

#: Norms by head of every kind, which leave attention with the process that has the heads.
HEADS = Placement(
    {
        "q": Norm(group="head", shared_alpha=True),
        "k": Norm(group="head", scale=False),
        "v": Norm(group="head", shared_alpha=True),
        "attn_out": Norm(),
        "ffn_out": Norm(),
        "final": Norm(),
    }
)
CASES = {
    **{name: config_of(name) for name in DENSE},
    **{f"{name}, mixture": config_of(name, moe=EXPERTS) for name in ("sdd", "prenorm-qk") if name in MIXTURES},
    "heads": config_of(HEADS),
    "heads, two of keys": config_of(HEADS, n_heads=4, n_kv_heads=2),
    "tied": config_of("sdd", tie_embeddings=True),
}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results(theirs, vocabulary):
    """Logits, and gradients of a loss by name."""
    tokens = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = {"inference": theirs(tokens).logits}
    out = theirs(tokens, labels=tokens)
    out.loss.backward()
    found |= {"logits": out.logits.detach(), "loss": out.loss.detach()}
    found |= {name: whole(p.grad) for name, p in theirs.named_parameters() if p.grad is not None}
    return {name: value.numpy() for name, value in found.items()}


def cut(rank, folders):
    found = {}
    for name, (folder, vocabulary) in folders.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = SDDForCausalLM.from_pretrained(folder, dtype=torch.float64, tp_plan="auto")
        matrices = [p for key, p in theirs.named_parameters() if key.endswith("proj.weight")]
        assert all(hasattr(p, "full_tensor") and p.to_local().numel() * 2 == p.numel() for p in matrices)
        found[name] = results(theirs.eval(), vocabulary)
    return found


def test_two_processes_have_the_logits_and_gradients_of_one(tmp_path):
    folders, alone = {}, {}
    for number, (name, config) in enumerate(CASES.items()):
        theirs = exported(drawn_model(config, dtype=torch.float64))
        theirs.save_pretrained(tmp_path / str(number))
        folders[name] = str(tmp_path / str(number)), config.vocab_size
        alone[name] = results(theirs, config.vocab_size)
    for found in in_processes(2, cut, folders):
        for name, expected in alone.items():
            assert found[name].keys() == expected.keys()
            for key, value in expected.items():
                one, other = (torch.as_tensor(each) for each in (found[name][key], value))
                assert (one - other).norm() <= 1e-10 * other.norm(), (name, key)


def test_what_norms_allow_stays_apart():
    plan = own_fields(CASES["heads"])["tensor_parallel"]
    assert plan["layers.*.self_attn.q_proj"] == "colwise"
    assert plan["layers.*.self_attn.o_proj"] == "rowwise"
    assert plan["layers.*.self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert "layers.*.self_attn.k_norm" not in plan
    assert plan["layers.*.mlp.down_proj"] == "rowwise"


@pytest.mark.parametrize("name", placements)
def test_what_a_norm_of_full_width_sees_is_gathered_before_it(name):
    plan, norms = own_fields(CASES[name])["tensor_parallel"], placements[name].norms
    for site in ("q", "k", "v"):
        if site in norms and norms[site].group == "full":
            assert plan[f"layers.*.self_attn.{site}_proj"] == "colwise_gather_output"
            assert plan["layers.*.self_attn.o_proj"] == "rowwise_split_input"
    for site in ("gate", "up"):
        if site in norms:
            assert plan[f"layers.*.mlp.{site}_proj"] == "colwise_gather_output"
            assert plan["layers.*.mlp.down_proj"] == "rowwise_split_input"
