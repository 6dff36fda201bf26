"""Result files: machine and revision, targets, and the page that the docs draw from them."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.bench import record
from sdd.bench.table import step_time_table
from sdd.bench.targets import TARGETS, check
from sdd.bench.timing import common_name, differences, quartiles, turned

ROOT = Path(__file__).parents[2]
GPU = {"machine": {"gpu": "NVIDIA H100 80GB HBM3", "driver": "570.1"}, "device": "cuda"}


def one_mode(seconds: float, ratio: float, peak: float) -> dict[str, Any]:
    return {
        "median_seconds": seconds,
        "ratio": ratio,
        "ratio_quartiles": [ratio, ratio],
        "tokens_per_second": 8192 / seconds,
        "mfu": 0.4,
        "peak_bytes": int(peak * 2**30),
        "peak_ratio": peak,
        "seconds": [seconds],
    }


def steps_result() -> dict[str, Any]:
    """A result of the 1b shape whose sdd takes 1.02 of the baseline's time and 0.9 of its memory."""
    entry = {"best": "compiled", "best_ratio": 1.02, "best_ratio_quartiles": [1.01, 1.03]}
    shape = {
        "preset": "1b",
        "part": "step",
        "n_layers": 16,
        "d_model": 2048,
        "context": 4096,
        "batch": 2,
        "precision": "bfloat16",
        "baseline": "prenorm-qk",
        "rounds": 1,
        "variants": {
            "prenorm-qk": {**entry, "best_ratio": 1.0, "modes": {"compiled": one_mode(0.5, 1, 1)}},
            "sdd": {**entry, "modes": {"compiled": one_mode(0.51, 1.02, 0.9), "eager": {"failed": "out of memory"}}},
        },
        "composed_over_ours": {"sdd": {"compiled": 1.04, "eager": None}},
    }
    return {"what": "steps", **GPU, "shapes": [shape]}


def kernels_result(share: float) -> dict[str, Any]:
    rows = [
        {
            "operation": "norm",
            "rows": 8,
            "width": width,
            "gb_per_second": {
                "triton": {"forward": 3000 * (share if width == 8192 else 0.95), "backward": 2400.0},
                "liger": {"failed": "out of memory"},
            },
        }
        for width in (512, 2048, 8192)
    ]
    return {**GPU, "dtype": "bfloat16", "copy": 3000.0, "operations": rows}


def found(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    return {one.target.measure: (one.value, one.reached) for one in check(result)}


def test_targets_are_read_from_results() -> None:
    forward, backward, step, composed, peak, _ = (target.measure for target in TARGETS)
    assert found(steps_result()) == {step: (1.02, "at least"), composed: (1.04, "missed"), peak: (0.9, "aim")}
    shares = found(kernels_result(0.85))
    assert shares == {forward: (pytest.approx(0.85), "at least"), backward: (pytest.approx(0.8), "at least")}


def test_targets_are_about_one_device_shape_and_precision() -> None:
    assert not check({**steps_result(), "machine": {"gpu": "NVIDIA L4"}})
    assert not check({**kernels_result(0.9), "dtype": "float32"})
    for key, value in {"preset": "581m", "part": "block", "precision": "float32", "baseline": "prenorm"}.items():
        other = deepcopy(steps_result())
        other["shapes"][0][key] = value
        assert not check(other), key
    on_cpu = {**steps_result(), "device": "cpu", "machine": {"gpu": None}}
    on_cpu["shapes"][0] |= {"preset": "micro", "precision": "float32"}
    assert found(on_cpu) == {TARGETS[-1].measure: (1.02, "aim")}


@given(st.sampled_from(TARGETS), st.floats(0, 2))
def test_a_target_is_reached_on_its_own_side(target: Any, value: float) -> None:
    better = value >= target.at_least if target.larger_is_better else value <= target.at_least
    assert (target.reached(value) != "missed") == better
    assert target.reached(target.aim) == "aim"


@given(st.lists(st.integers(), max_size=6, unique=True), st.integers(0, 20))
def test_every_item_takes_every_place(items: list[int], rounds: int) -> None:
    assert sorted(turned(items, rounds)) == sorted(items)
    firsts = {turned(items, index)[0] for index in range(len(items))}
    assert firsts == set(items)


@given(st.lists(st.floats(0.1, 10), min_size=1))
def test_quartiles_lie_within_the_values(values: list[float]) -> None:
    low, high = quartiles(values)
    assert min(values) <= low <= high <= max(values) or low == pytest.approx(high)


def test_a_profile_compares_kernels_whatever_their_numbers() -> None:
    assert common_name("graph_1_cpp_fused_add_mul_12") == common_name("graph_0_cpp_fused_add_mul_3")
    assert common_name("triton_red_fused_add_7") == "triton_red_fused_add"
    assert common_name("## Call CompiledFxGraph fx2 ##") == common_name("## Call CompiledFxGraph fy ##")
    assert common_name("aten::mm") == "aten::mm"
    assert differences({"a": {"ms": 3.0}, "b": {"ms": 1.0}}, {"a": {"ms": 2.5}, "c": {"ms": 4.0}}) == {
        "c": -4.0,
        "b": 1.0,
        "a": 0.5,
    }


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_the_revision_is_that_of_the_packages_own_repository(tmp_path, monkeypatch):
    package = tmp_path / "project" / "lib"
    package.mkdir(parents=True)
    (package / "record.py").touch()
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    assert record.revision() is None, "no repository"
    git(tmp_path / "project", "init")
    assert record.revision() is None, "an environment inside of another project"
    git(tmp_path / "project", "add", ".")
    git(tmp_path / "project", "commit", "-m", "first")
    revision = record.revision()
    assert revision is not None
    assert len(revision) >= 7
    (package / "record.py").write_text("changed")
    assert record.revision() == f"{revision}-dirty"
    monkeypatch.setenv("PATH", "")
    assert record.revision() is None, "no git"


def test_the_driver_is_what_its_tool_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.driver() == "570.86.15"


@pytest.fixture
def page(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    import benchmark_results

    yield benchmark_results
    for name in ("benchmark_results", "tables"):
        del sys.modules[name]


def drawn(page: Any, result: dict[str, Any]) -> str:
    return "\n".join(part if isinstance(part, str) else part.astext() for part in page.numbers(result))


def test_the_page_shows_steps_and_what_failed(page):
    text = drawn(page, steps_result())
    assert "\n".join(step_time_table(steps_result())).strip() in text
    for part in ("1.020", "out of memory", "40.0%", "1b, 16 blocks, 2 x 4096 tokens, bfloat16"):
        assert part in text
    top = page.heading("step_time_cuda", steps_result(), {"step_time": "A step.", "step": "Another."})
    assert "`./dev bench step_time`: A step." in top
    assert "driver 570.1" in top


def test_the_page_says_which_targets_are_met(page):
    table = page.target_table({"kernels_cuda": kernels_result(0.5), "step_time_cuda": steps_result()})
    lines = table.splitlines()[2:]
    assert [line.split("|")[5].strip() for line in lines] == [
        "**missed**",
        "met",
        "met",
        "**missed**",
        "aim met",
        "not measured yet",
    ]
    assert page.target_table({}).count("not measured yet") == len(TARGETS)


def test_the_page_draws_a_result_that_it_does_not_know(page):
    result = {
        "machine": {"cpu": "x"},
        "what": "speed",
        "threads": 2,
        "ratios": [1.0, 3.0, 2.0],
        "presets": {"nano": {"a": {"ms": 12.345, "n": 12345}, "b": {"ms": 1.5}, "seconds": {"a": [{"t": 0.777}] * 9}}},
        "runs": [{"copies": 1, "peak": 2.5}, {"copies": 4, "peak": 3.5}],
    }
    text = drawn(page, result)
    assert "threads 2, ratios 2 (1 to 3, 3 times)" in text
    assert "| `a` | 12.3 | 12,345 |" in text
    assert "| `b` | 1.5 |  |" in text
    assert "| `2` | 4 | 3.5 |" in text
    assert "0.777" not in text, "raw rounds"


def test_the_page_draws_every_committed_result(page):
    results = page.read_results(ROOT / "benchmarks" / "results")
    about = page.read_about(ROOT / "benchmarks")
    assert results
    for name, result in results.items():
        assert "./dev bench" in page.heading(name, result, about)
        assert drawn(page, result)
