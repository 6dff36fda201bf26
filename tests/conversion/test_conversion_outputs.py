"""Which projections write to the residual stream, and how many blocks a model has."""

import pytest
import torch
from helpers_trees import stack, tree
from torch import nn

from sdd.conversion import convert

D, H = 8, 24


def outputs(model: nn.Module) -> list[str]:
    return [layer.name for layer in convert(model).converted if layer.is_output]


def mlp() -> nn.Module:
    return tree(one=nn.Linear(D, H), two=nn.Linear(H, D))


def attention(*names: str) -> nn.Module:
    return tree(**{name: nn.Linear(D, D) for name in names})


BLOCKS = {
    "branches without known names": (
        lambda: tree(mix=attention("a", "b", "c", "d"), think=mlp()),
        ["mix.d", "think.two"],
    ),
    "a sequential": (lambda: tree(m=nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), nn.Dropout())), ["m.2"]),
    "gated, the output in the middle": (
        lambda: tree(mlp=tree(w1=nn.Linear(D, H), w2=nn.Linear(H, D), w3=nn.Linear(D, H))),
        ["mlp.w2"],
    ),
    "a square gate after a named output": (lambda: tree(att=attention("q", "k", "o_proj", "g")), ["att.o_proj"]),
    "side by side": (
        lambda: tree(**{n: nn.Linear(D, D) for n in "abcd"}, up=nn.Linear(D, H), back=nn.Linear(H, D)),
        ["d", "back"],
    ),
    "side by side, q|k|v in one": (
        lambda: tree(a=nn.Linear(D, 3 * D), b=nn.Linear(D, D), c=nn.Linear(D, H), d=nn.Linear(H, D)),
        ["b", "d"],
    ),
    "experts and a shared one": (
        lambda: tree(att=attention("q", "k"), moe=tree(gate=nn.Linear(D, 3), experts=stack(3, mlp), shared=mlp())),
        ["att.k", *(f"moe.experts.{i}.two" for i in range(3)), "moe.shared.two"],
    ),
    "branches in a list": (
        lambda: tree(layer=nn.ModuleList([attention("q", "o"), mlp()])),
        ["layer.0.o", "layer.1.two"],
    ),
    "low rank": (
        lambda: tree(att=tree(a=nn.Linear(D, 3), b=nn.Linear(3, H), o=nn.Linear(H, D)), mlp=mlp()),
        ["att.o", "mlp.two"],
    ),
    "mixers of two widths": (
        lambda: tree(tokens=tree(a=nn.Linear(5, H), b=nn.Linear(H, 5)), channels=mlp()),
        ["tokens.b", "channels.two"],
    ),
    "a projection out and back in two children": (
        lambda: tree(up=tree(dense=nn.Linear(D, H)), back=tree(dense=nn.Linear(H, D)), att=attention("x", "y")),
        ["back.dense", "att.y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_by_structure(block: str):
    build, expected = BLOCKS[block]
    assert outputs(tree(layers=stack(2, build))) == [f"layers.{i}.{name}" for i in (0, 1) for name in expected]


@pytest.mark.parametrize(
    "name", ["Wo", "O_PROJ", "out_lin", "lin2", "linear_out", "ffn_output", "output_dense", "pwconv2", "Attention.o"]
)
def test_outputs_by_name_in_any_case_where_there_are_no_blocks(name: str):
    parent, _, last = name.rpartition(".")
    inner = tree(**{last: nn.Linear(D, D)}, other=nn.Linear(D, D))
    model = tree(**{parent or "part": inner})
    assert outputs(model) == [f"{parent or 'part'}.{last}"]


def test_outputs_by_place_in_a_sequential():
    assert outputs(tree(mlp=nn.Sequential(*(nn.Linear(D, D) for _ in range(4))))) == ["mlp.3"]
    assert outputs(tree(net=nn.Sequential(*(nn.Linear(D, D) for _ in range(5))))) == ["net.4"]


def test_without_any_output_a_note_says_so():
    assert any("writes to the residual stream" in note for note in convert(tree(a=nn.Linear(D, D))).notes)
    assert not any("writes to the residual stream" in note for note in convert(tree(wo=nn.Linear(D, D))).notes)


def test_a_note_says_so_where_those_that_were_found_stay():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.wo = nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x):
            return nn.functional.linear(self.up(x), self.wo.weight)

    notes = convert(Reads(), example=torch.randn(3, D)).notes
    assert sum("no projection that writes to the residual stream is converted" in note for note in notes) == 1


def block() -> nn.Module:
    return tree(att=attention("q", "o"), mlp=mlp())


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = block()


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(D, D)


def test_stages_count_with_all_their_blocks():
    stages = [tree(blocks=stack(n, block), reduction=nn.Linear(D, D)) for n in (2, 2, 6, 2)]
    report = convert(tree(layers=nn.ModuleList(stages)))
    assert report.n_layers == 12
    assert sum(layer.is_output for layer in report.converted) == 24
    assert [layer.name for layer in report.converted if layer.outside] == [f"layers.{i}.reduction" for i in range(4)]
    bare = nn.ModuleList(nn.Sequential(*(block() for _ in range(n))) for n in (1, 3, 1))
    assert convert(tree(stages=bare)).n_layers == 5
    singles = [tree(blocks=stack(1, block), reduction=nn.Linear(D, D)) for _ in range(3)]
    found = outputs(tree(layers=nn.ModuleList(singles)))
    assert found == [f"layers.{i}.blocks.0.{name}" for i in range(3) for name in ("att.o", "mlp.two")]
    between = nn.Sequential(Stem(), bare[0], Stem(), bare[1], Stem(), bare[2])  # as torchvision writes Swin
    assert convert(tree(features=between)).n_layers == 5


def test_blocks_of_several_types_count_and_a_stem_does_not():
    assert convert(tree(layers=nn.ModuleList([Stem(), block(), block(), Other(), block()]))).n_layers == 4


def test_lists_inside_blocks_are_no_stages():
    def cross() -> nn.Module:
        return nn.ModuleList([attention("q", "o"), attention("q", "o"), Other()])

    assert convert(tree(layers=stack(3, cross))).n_layers == 3
    moe = stack(2, lambda: tree(o_proj=nn.Linear(D, D), experts=stack(5, mlp)))
    assert convert(tree(layers=moe)).n_layers == 2


def test_a_block_that_is_called_again_and_again_counts_as_its_config_says():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.AlbertConfig(vocab_size=32, num_hidden_layers=5, **sizes)
    assert convert(transformers.AlbertForMaskedLM(config)).n_layers == 5
