"""The table of docs/tutorials/choose.md: what it reads, and what it shows where there is nothing."""

import json
import sys
from pathlib import Path

import pytest

from sdd.placement import placements

ROOT = Path(__file__).parents[1]


@pytest.fixture
def which(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    yield __import__("which")
    sys.modules.pop("which", None)


def value(mean, half=None, n=3, lost=0):
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"value": mean, "low": low, "high": high, "n": n, "not_converged": lost}


def write(root, study, table, rows):
    path = root / "docs" / "studies" / study / "tables" / f"{table}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}))


def cells(text):
    """The table as rows of cells by the first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return lines[0], {line[0].strip("`"): line[1:] for line in lines[2:]}


def test_every_placement_has_a_row_and_nothing_is_a_dash(which, tmp_path):
    write(tmp_path, "lr", "sensitivity", [{"method": "sdd", "LR sensitivity": value(0.25, 0.125)}])
    header, rows = cells(which.which_table(tmp_path))
    assert header == ["placement", "sensitivity to the rate, 0.08M tokens"]
    assert rows == {name: ["0.250 ± 0.125" if name == "sdd" else "–"] for name in placements}


def test_each_column_says_what_its_study_says(which, tmp_path):
    comparisons = [
        ("sdd against prenorm-qk", -0.5, 0.25),
        ("peri against prenorm-qk", 0.5, None),
        ("sdd against peri", 9, 9),
    ]
    lead = [
        {"comparison": name, "3M tokens": value(mean, half), "for ten times the tokens": value(1)}
        for name, mean, half in comparisons
    ]
    write(tmp_path, "length", "lead", lead)
    broken = {
        "method": "postnorm",
        "default": value(5.0),
        "lr x5": value(None, n=0, lost=3),
        "no warm-up": value(6, n=1, lost=2),
    }
    write(tmp_path, "robustness", "loss", [broken])
    write(tmp_path, "max-rate", "rate", [{"method": "sdd", "12 blocks": ">0.3", "64 blocks": "0.1"}])
    fine, lost = value(5.0, 1.0), value(5.0, n=2, lost=1)
    depths = [
        {"method": name, "8 blocks": first, "64 blocks": last}
        for name, first, last in (("sdd", fine, fine), ("peri", fine, lost), ("keel", lost, lost))
    ]
    write(tmp_path, "depth", "loss", depths)
    _, rows = cells(which.which_table(tmp_path))
    assert rows["sdd"] == ["-0.500 ± 0.250", "–", ">0.3", "0.1", ">= 64 blocks"]
    assert rows["peri"] == ["+0.500", "–", "–", "–", "8 blocks"]
    assert rows["prenorm-qk"] == ["0", "–", "–", "–", "–"]
    assert rows["postnorm"] == ["–", "4 of 9", "–", "–", "–"]
    assert rows["keel"] == ["–"] * 5


def test_a_placement_that_was_a_variant_is_found_under_that_name(which, tmp_path):
    write(tmp_path, "lr", "sensitivity", [{"method": "mix-depth", "LR sensitivity": value(0.5)}])
    assert cells(which.which_table(tmp_path))[1]["sdd-depth"] == ["0.500"]
    own = [{"method": name, "LR sensitivity": value(x)} for name, x in (("mix-depth", 0.5), ("sdd-depth", 0.25))]
    write(tmp_path, "lr", "sensitivity", own)
    assert cells(which.which_table(tmp_path))[1]["sdd-depth"] == ["0.250"]


def test_the_committed_results_fill_it(which):
    header, rows = cells(which.which_table(ROOT))
    assert sum("tokens" in title for title in header) >= 4
    assert sum("step" in title for title in header) == 2
    assert "–" not in rows["sdd-v1"]
    assert "–" not in rows["prenorm-qk"]
    assert rows["sdd"][:3] == rows["sdd-v1"][:3]  # searched over init scales


def test_the_cost_of_sdd_is_that_of_the_former_default(which):
    assert which.shared({"sdd": "0.94", "peri": "1"}) == {"sdd": "0.94", "sdd-v1": "0.94", "peri": "1"}
    assert which.shared({"sdd": "-1", "sdd-v1": "-2"}) == {"sdd": "-1", "sdd-v1": "-2"}


def test_a_length_is_read_from_the_first_folder_that_has_it(which, tmp_path):
    def lead(**lengths):
        return [{"comparison": "sdd against prenorm-qk", **{f"{name} tokens": value(x) for name, x in lengths.items()}}]

    write(tmp_path, "length", "lead", lead(**{"1M": -0.5}))
    write(tmp_path, "length-3m", "lead", lead(**{"1M": -9, "3M": -0.25}))
    header, rows = cells(which.which_table(tmp_path))
    assert header[1:] == ["loss minus `prenorm-qk`'s, 1M tokens", "loss minus `prenorm-qk`'s, 3M tokens"]
    assert rows["sdd"] == ["-0.500", "-0.250"]
    assert rows["prenorm-qk"] == ["0", "0"]
