"""`sdd bench` from the command line to the result file, at tiny sizes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdd.bench import kernels as bench_kernels
from sdd.bench import variants as bench_variants
from sdd.bench.operations import OPERATIONS
from sdd.commands.main import main
from sdd.models.flops import training_flops
from sdd.models.presets import model_presets

KERNELS = "bench kernels --device cpu --mib 1 --rounds 2 --widths 64"
STEP = "bench step-time nano --device cpu --layers 1 --context 8 --batch 2 --rounds 3 --modes eager"


def run(line: str, *more: object) -> int:
    return main([*line.split(), *map(str, more)])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bench kernel", "did you mean 'kernels'"),
        ("bench kernels --round 3", "did you mean '--rounds'"),
        ("bench kernels --rounds -1", "'-1'"),
        ("bench kernels --widths 100", "--widths 100 must be a multiple of 64"),
        ("bench kernels --mib 1 --widths 64,524288", "a row not more than --mib"),
        ("bench kernels --operations norm,swigl", "'swigl' is none of norm"),
        ("bench kernels --dtype int8", "'int8' is none of bfloat16, float16, float32"),
        ("bench kernels --device gpu", "'gpu' is none of auto, cuda, cpu"),
        ("bench kernels --out /no/such/folder/x.json", "/no/such/folder is no folder"),
        ("bench step-time nanoo", "no preset 'nanoo' (did you mean 'nano'?)"),
        ("bench step-time --variants sdd,prenrm", "no placement 'prenrm' (did you mean 'prenorm'?)"),
        ("bench step-time --variants sdd+fused", "only +composed can stand"),
        ("bench step-time --modes fast", "'fast' is none of eager, compiled"),
        ("bench step-time --gpu TPU", "no GPU 'TPU' in the table"),
        ("bench step-time --batch 99999999999999999999", "100,000,000"),
        pytest.param(
            "bench step-time --device cuda",
            "device='cuda' is not available here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here"),
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(line) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_told_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for line in (f"{KERNELS} --compiled", "bench step-time nano --device cpu --modes compiled"):
        assert run(line) == 2
        assert "torch.compile needs g++" in capsys.readouterr().err


def test_kernels_measures_every_operation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(KERNELS) == 0
    result = read(tmp_path / "kernels_cpu.json")
    assert [row["operation"] for row in result["operations"]] == list(OPERATIONS)
    for row in result["operations"]:
        assert row["rows"] * row["width"] * 4 == 1 << 20
        assert row["gb_per_second"].keys() == {"recompute", "composed"}
        assert all(speed > 0 for one in row["gb_per_second"].values() for speed in one.values())
    assert result["copy"] > 0
    assert {"date", "revision", "sdd", "torch", "cpu", "gpu"} <= result["machine"].keys()
    printed = capsys.readouterr().out
    assert all(name in printed for name in OPERATIONS)
    assert run(KERNELS, "--operations", "norm") == 0
    assert len(read(tmp_path / "kernels_cpu-2.json")["operations"]) == 1, "an earlier result is not written over"


@pytest.mark.slow
def test_kernels_are_compiled_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("sdd.commands.bench.can_compile", lambda device: True)
    out = tmp_path / "out.json"
    assert run(KERNELS, "--operations", "norm,qk-norm-rope", "--compiled", "--out", out) == 0
    assert all(row["gb_per_second"]["compiled composed"]["backward"] > 0 for row in read(out)["operations"])


def test_small_sizes_are_whole_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "SMALL_ROWS", (1, 4))
    assert run(KERNELS, "--small", "--out", tmp_path) == 0
    rows = read(tmp_path / "kernels_small_cpu.json")["small"]
    assert [row["numel"] for row in rows] == [256, 2048, 1024, 8192]
    assert all(time > 0 for row in rows for time in row["microseconds"].values())


def test_a_kernel_variant_without_memory_is_a_result(tmp_path, monkeypatch):
    real = bench_kernels.variants

    def with_greedy(*args: Any) -> dict[str, Any]:
        return {"greedy": exhausted, **real(*args)}

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(bench_kernels, "variants", with_greedy)
    out = tmp_path / "out.json"
    assert run(KERNELS, "--operations", "norm", "--out", out) == 0
    speeds = read(out)["operations"][0]["gb_per_second"]
    assert speeds["greedy"] == {"failed": "out of memory"}
    assert speeds["composed"]["forward"] > 0


def test_step_time_of_models(tmp_path, capsys):
    out = tmp_path / "out.json"
    names = "prenorm-qk,sdd,sdd+composed,sdd-released,olmo2,peri"
    assert run(STEP, "--variants", names, "--gpu", "L4", "--out", out, "--json") == 0
    result = read(out)
    assert json.loads(capsys.readouterr().out) == result
    (shape,) = result["shapes"]
    assert list(shape["variants"]) == names.split(",")
    assert shape["rounds"] == 3
    for variant in shape["variants"].values():
        one = variant["modes"]["eager"]
        assert len(one["seconds"]) == 3
        assert one["tokens_per_second"] == pytest.approx(16 / one["median_seconds"])
        assert 0 < one["mfu"] < 1
        assert one["peak_bytes"] > 0
    base = shape["variants"]["prenorm-qk"]["modes"]["eager"]
    assert base["ratio"] == base["peak_ratio"] == 1
    composed = shape["composed_over_ours"]["sdd"]["eager"]
    assert min(base["seconds"]) > 0
    assert composed > 0


def test_step_time_of_one_block_profiled(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run(STEP, "--block", "--variants", "prenorm-qk,sdd-paper", "--profile", "--out", out) == 0
    (shape,) = read(out)["shapes"]
    assert (shape["part"], shape["n_layers"]) == ("block", 1)
    for modes in shape["profile"].values():
        assert modes["eager"]["aten::mm"]["calls"] >= 14, "seven products, each with two derivatives"
        assert all(row["ms"] > 0 for row in modes["eager"].values())
    printed = capsys.readouterr().out
    assert "ms a step more than prenorm-qk, sdd-paper, eager" in printed


@pytest.mark.slow
def test_eager_and_compiled_take_turns_in_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("sdd.commands.bench.can_compile", lambda device: True)
    out = tmp_path / "out.json"
    assert run(STEP.replace("eager", "eager,compiled"), "--variants", "prenorm-qk,sdd", "--out", out) == 0
    (shape,) = read(out)["shapes"]
    for variant in shape["variants"].values():
        medians = {mode: one["median_seconds"] for mode, one in variant["modes"].items()}
        assert variant["best"] == min(medians, key=lambda mode: medians[mode])
    own, base = (shape["variants"][name] for name in ("sdd", "prenorm-qk"))
    rounds = [
        mine / theirs
        for mine, theirs in zip(
            own["modes"][own["best"]]["seconds"], base["modes"][base["best"]]["seconds"], strict=True
        )
    ]
    assert own["best_ratio"] == pytest.approx(sorted(rounds)[1])


def failing_after(monkeypatch: pytest.MonkeyPatch, steps: int, error: BaseException) -> None:
    """Let the model of `sdd` fail in the step after so many, with its gradients there."""
    real, done = bench_variants.clip_gradients, []

    def clip(model: Any, limit: float) -> Any:
        if model.config.placement.name == "sdd":
            done.append(model)
            if len(done) > steps:
                raise error
        return real(model, limit)

    monkeypatch.setattr(bench_variants, "clip_gradients", clip)


@pytest.mark.parametrize("steps", [0, 4])
def test_a_model_without_memory_is_a_result_and_the_others_go_on(steps, tmp_path, capsys, monkeypatch):
    failing_after(monkeypatch, steps, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    out = tmp_path / "out.json"
    assert run(STEP, "--variants", "prenorm-qk,sdd,peri,sdd+composed", "--out", out) == 0
    (shape,) = read(out)["shapes"]
    sdd = shape["variants"]["sdd"]
    assert sdd["modes"]["eager"] == {"failed": "out of memory"}
    assert sdd["best"] is sdd["best_ratio"] is shape["composed_over_ours"]["sdd"]["eager"] is None
    assert len(shape["variants"]["peri"]["modes"]["eager"]["seconds"]) == 3
    assert "out of memory" in capsys.readouterr().out


def test_without_memory_for_the_base_there_are_times_and_no_ratios(tmp_path, monkeypatch):
    failing_after(monkeypatch, 0, MemoryError())
    out = tmp_path / "out.json"
    assert run(STEP, "--variants", "sdd,peri", "--out", out) == 0
    peri = read(out)["shapes"][0]["variants"]["peri"]
    assert peri["modes"]["eager"]["median_seconds"] > 0
    assert peri["modes"]["eager"]["ratio"] is peri["best_ratio"] is None


def test_interrupted_it_keeps_the_rounds_that_it_has(tmp_path, capsys, monkeypatch):
    failing_after(monkeypatch, 5, KeyboardInterrupt())
    out = tmp_path / "out.json"
    assert run(STEP, "--variants", "prenorm-qk,sdd", "--out", out) == 130
    assert f"what was measured is in {out}" in capsys.readouterr().err
    result = read(out)
    assert result["interrupted"]
    assert result["shapes"][0]["rounds"] == 2
    assert len(result["shapes"][0]["variants"]["sdd"]["modes"]["eager"]["seconds"]) == 2


def test_interrupted_in_a_second_shape_it_keeps_the_first(tmp_path, monkeypatch):
    failing_after(monkeypatch, 6, KeyboardInterrupt())
    out = tmp_path / "out.json"
    assert run(STEP.replace("nano", "nano nano"), "--variants", "prenorm-qk,sdd", "--out", out) == 130
    (shape,) = read(out)["shapes"]
    assert shape["rounds"] == 3


def test_interrupted_before_the_first_round_it_leaves_an_older_result(tmp_path, capsys, monkeypatch):
    failing_after(monkeypatch, 0, KeyboardInterrupt())
    out = tmp_path / "out.json"
    out.write_text("older")
    assert run(STEP, "--variants", "prenorm-qk,sdd", "--out", out) == 130
    assert "nothing was measured" in capsys.readouterr().err
    assert out.read_text() == "older"


def test_variants_share_what_costs_memory_and_compute_what_they_should() -> None:
    shape = model_presets["nano"]
    setting = bench_variants.Setting(shape, False, 1, torch.device("cpu"), None)
    ours, composed = bench_variants.build(setting, ["sdd-paper", "sdd-paper+composed"], ["eager"])
    config = bench_variants.configured("sdd-paper+composed", shape)
    assert not config.eliminate_norms
    assert config.placement == bench_variants.configured("sdd-paper", shape).placement
    assert ours.flops == composed.flops == training_flops(shape).model
    assert ours.resident == composed.resident
    first, other = (torch.nn.Linear(4, 4) for _ in range(2))
    bench_variants.share_matrices(other, first)
    assert other.weight is first.weight
    assert other.bias is not first.bias
    optimizers = [torch.optim.AdamW([{"params": [*net.parameters()], "names": ["a", "b"]}]) for net in (first, other)]
    bench_variants.share_moments(optimizers[0], optimizers[0])
    bench_variants.share_moments(optimizers[1], optimizers[0])
    assert optimizers[1].state[other.weight]["exp_avg"] is optimizers[0].state[first.weight]["exp_avg"]
    assert other.bias in optimizers[1].state


def test_memory_growth_is_the_peak_of_what_is_alive_at_once() -> None:
    def run_() -> None:
        a = torch.ones(1 << 18)
        b = a + a
        del a
        (b * b).sum()

    growth = bench_variants.memory_growth(run_, torch.device("cpu"))
    assert 2 << 20 <= growth < (2 << 20) + 1024
