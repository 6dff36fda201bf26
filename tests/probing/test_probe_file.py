"""The file format: what is written is what is read."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.files import finite
from sdd.probing import STATISTICS, append_row, read_probe

VALUE = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf])
SITES = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn", "ffn.up_proj")]


@st.composite
def drawn_rows(draw):
    """Rows of a few steps, in which each site has its own statistics, the same in every row."""
    steps = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=4, unique=True))
    stats = {site: draw(st.sets(st.sampled_from(sorted(STATISTICS)), min_size=1)) for site in SITES}
    layers = draw(st.integers(1, 4))
    return [
        {
            "step": step,
            "sites": {site: {stat: draw(VALUE) for stat in sorted(stats[site])} for site in SITES},
            "layers": {
                "rms": [draw(VALUE) for _ in range(layers + 1)],
                "cosine": [draw(VALUE) for _ in range(layers)],
            },
        }
        for step in steps
    ]


def same(found, expected):
    """Equal to five significant digits, and in what is not finite."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, np.vectorize(lambda x: float(finite(float(x), 5)))(expected), rtol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=5e-5)


@settings(max_examples=20)
@given(drawn_rows())
def test_what_was_written_is_read(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("probe") / "probe.jsonl"
    for row in rows:
        append_row(file, row)
    with file.open("a") as stream:
        stream.write('{"step": 7, "sites"')  # a process killed while it wrote
    found = read_probe(file)
    rows = sorted(rows, key=lambda row: row["step"])
    assert found.steps.tolist() == [row["step"] for row in rows]
    assert list(found.sites) == SITES
    for stat in STATISTICS:
        there = [site for site in SITES if stat in rows[0]["sites"][site]]
        assert list(found.has(stat)) == there
        for site in there:
            same(found.series(site, stat), [row["sites"][site][stat] for row in rows])
    for stat in ("rms", "cosine"):
        same(found.layers[stat], [row["layers"][stat] for row in rows])


def test_a_step_written_again_counts_once(tmp_path):
    for value in (1.0, 2.0):
        append_row(tmp_path / "p", {"step": 3, "sites": {"a": {"rms": value}}, "layers": {}})
    found = read_probe(tmp_path / "p")
    assert found.steps.tolist() == [3]
    assert found.series("a", "rms").tolist() == [2.0]


def test_an_empty_file_has_no_steps(tmp_path):
    (tmp_path / "p").touch()
    found = read_probe(tmp_path / "p")
    assert found.steps.shape == (0,)
    assert found.has("rms") == ()
