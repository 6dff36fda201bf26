"""The report as data and as text."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.conversion import ConversionReport, ConvertedLayer, KeptLayer
from sdd.conversion.table import collapse

REPORT = ConversionReport(
    converted=tuple(
        ConvertedLayer(f"layers.{i}.{name}", shape, alpha, is_output)
        for i in range(30)
        for name, shape, alpha, is_output in [("q_proj", (64, 64), 1.0, False), ("down", (64, 128), 30**-0.5, True)]
    ),
    kept=(KeptLayer("lm_head", "the head"), *(KeptLayer(f"layers.{i}.router", "a router") for i in (0, 2, 3))),
    n_layers=30,
    notes=("read me",),
)


def test_text_shows_repeated_blocks_in_one_line():
    assert str(REPORT).splitlines() == [
        "60 layers converted, 30 of them output projections; L = 30 blocks",
        "",
        "converted              V [out, in]  alpha",
        "layers.{0..29}.q_proj  [64, 64]     1",
        "layers.{0..29}.down    [64, 128]    0.1826  output",
        "",
        "kept                   reason",
        "lm_head                the head",
        "layers.{0,2,3}.router  a router",
        "",
        "note: read me",
    ]


def test_text_of_a_report_without_more():
    text = str(ConversionReport((ConvertedLayer("a", (2, 3), 1.0, False),), (), 1))
    assert text.splitlines() == [
        "1 layer converted, 0 of them output projections; L = 1 block",
        "",
        "converted  V [out, in]  alpha",
        "a          [2, 3]       1",
    ]


def test_dict_survives_json():
    report = REPORT.to_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["n_layers"] == 30
    assert report["converted"][1] == {
        "name": "layers.0.down",
        "shape": [64, 128],
        "alpha_init": 30**-0.5,
        "is_output": True,
        "eps": 1e-6,
        "group": None,
        "shared_alpha": False,
        "kind": "Linear",
        "outside": False,
        "digest": None,
        "calibration": None,
    }
    assert report["kept"][0] == {"name": "lm_head", "reason": "the head"}
    assert report["notes"] == ["read me"]


def expand(name: str) -> list[str]:
    """The names that a collapsed one stands for."""
    head, brace, rest = name.partition("{")
    if not brace:
        return [name]
    inside, _, tail = rest.partition("}")
    numbers = []
    for run in inside.split(","):
        first, _, last = run.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return [f"{head}{number}{end}" for number in numbers for end in expand(tail)]


@settings(deadline=None, max_examples=100)
@given(
    names=st.sets(
        st.lists(st.one_of(st.sampled_from("ab"), st.integers(0, 12).map(str)), min_size=1, max_size=4).map(".".join)
    ),
    cut=st.integers(0, 12),
)
def test_collapsed_names_stand_for_exactly_the_given_ones(names, cut):
    rows = [(name, "early" if name < str(cut) else "late") for name in sorted(names)]
    collapsed = collapse(rows)
    assert sorted((full, column) for name, column in collapsed for full in expand(name)) == sorted(rows)
    assert len(collapsed) <= len(rows)


def test_collapse_folds_blocks_and_experts_together():
    rows = [(f"layers.{i}.experts.{j}.w1", "x") for i in range(3) for j in range(8)]
    assert collapse(rows) == [("layers.{0..2}.experts.{0..7}.w1", "x")]
    assert collapse([*rows, ("layers.3.experts.0.w1", "x")]) == [
        ("layers.{0..2}.experts.{0..7}.w1", "x"),
        ("layers.3.experts.0.w1", "x"),
    ]
