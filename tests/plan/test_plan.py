import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.commands.main import main
from sdd.errors import UserError
from sdd.kernels.dispatch import HAS_TRITON
from sdd.models.flops import training_flops
from sdd.plan import find_gpu, gpus, make_plan, measure, measure_memory, show_plan
from sdd.plan.gpus import gpu_of_device
from sdd.train import DataConfig, preset
from sdd.train.parallel import World

H100 = gpus["H100-SXM"]


@pytest.fixture(scope="module", autouse=True)
def _each_case_is_measured_once() -> Iterator[None]:
    """Tests of this file share what is measured: how, is tested elsewhere."""
    found: dict[object, object] = {}
    original = measure.measure_directly

    def once(case: measure.MemoryCase) -> object:
        key = type(case), repr(case), case.has_kernels
        if key not in found:
            found[key] = original(case)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure_directly", once)
        yield


@pytest.mark.parametrize("name", gpus)
def test_gpus_are_found_however_they_are_written(name: str) -> None:
    for written in (name, name.lower(), name.replace("-", " "), name.replace("-", "_").upper()):
        assert find_gpu(written) is gpus[name]


def test_an_unknown_gpu_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UserError, match="did you mean H100-SXM or"):
        find_gpu("H100 SMX")
    with pytest.raises(UserError, match="no GPU 'TPU'"):
        find_gpu("TPU")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_device_is_found_by_the_name_that_its_driver_reports(name: str, expected: str | None) -> None:
    found = gpu_of_device(name)
    assert (found.name if found else None) == expected


@pytest.mark.parametrize("gpu", gpus.values(), ids=gpus)
def test_the_table_is_plausible(gpu) -> None:
    assert gpu.bfloat16 >= 1.9 * gpu.float32
    assert 70 <= gpu.peak("bfloat16") / (gpu.bandwidth * 1e9) <= 450, "FLOPs a byte"
    assert gpu.source.startswith(("NVIDIA", "AMD"))


@settings(max_examples=6)
@given(st.integers(1, 4), st.integers(1, 48))
def test_the_batch_is_split_as_training_splits_it(gpus_: int, rows: int) -> None:
    run = replace(preset("nano"), data=DataConfig(batch_size=rows * gpus_))
    plan = make_plan(run, gpus["A10"], gpus_)
    passes = World(size=gpus_).passes(run.data.batch_size, plan.accumulate)
    assert plan.case.micro_batch * passes * gpus_ == run.data.batch_size
    assert replace(run, accumulate=plan.accumulate), "a valid setting"


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    plan = make_plan(preset("1b"), H100, 8)
    assert plan.fits
    assert plan.memory.peak <= plan.capacity
    larger = replace(plan.case, micro_batch=2 * plan.case.micro_batch)
    assert measure_memory(larger).peak > plan.capacity


def test_a_run_that_does_not_fit_is_planned_with_one_sequence() -> None:
    run = replace(preset("2b"), activation_checkpointing=False)
    plan = make_plan(run, gpus["A10"])
    assert not plan.fits
    assert plan.case.micro_batch == 1
    assert "it does NOT fit" in show_plan("2b", plan)


def test_time_follows_from_flops_peak_and_mfu() -> None:
    run = preset("1b")
    plan = make_plan(run, H100, 64, mfu=0.4, tokens=200_000_000_000, micro_batch=1)
    flops = training_flops(run.model).model
    assert plan.tokens_per_second == pytest.approx(64 * 0.4 * 989e12 / flops)
    assert plan.seconds == pytest.approx(200e9 / plan.tokens_per_second, rel=1e-4)
    assert plan.gpu_hours == pytest.approx(64 * plan.seconds / 3600)
    assert plan.steps == run.steps
    assert plan.hardware_utilisation > plan.mfu
    half = make_plan(run, H100, 32, mfu=0.4, micro_batch=1)
    assert half.gpu_hours == pytest.approx(plan.gpu_hours)
    slow = make_plan(replace(run, precision="float32"), H100, 64, micro_batch=1)
    assert slow.tokens_per_second == pytest.approx(plan.tokens_per_second * 67 / 989)


def test_the_command_prints_json(capsys) -> None:
    line = "plan 581m --gpus 8 --gpu h100sxm --tokens 10B --mfu 0.5 --context 2048 --batch-size 512 --placement olmo2"
    assert main([*line.split(), "--micro-batch", "4", "--activation-checkpointing", "false", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == {
        "sequences": 512,
        "context": 2048,
        "tokens": 2**20,
        "micro_batch": 4,
        "accumulate": 128,
    }
    assert found["placement"] == "olmo2"
    assert found["time"]["tokens"] == 10**10
    assert found["flops_per_token"]["recomputed"] == 2 * 8 * 2048 * 2048
    states = sum(found["memory"][part] for part in ("weights", "moments", "gradients"))
    assert states == pytest.approx(16 * found["parameters"]["total"] / 8, rel=1e-3)
    assert len(found["alternatives"]) == 4


@pytest.mark.parametrize("line", ["nano --gpu a10", "1b --gpu h200 --gpus 16 --chunked-loss true --printed-shape"])
def test_the_table_is_aligned_and_complete(line: str, capsys) -> None:
    assert main(["plan", *line.split()]) == 0
    text = capsys.readouterr().out
    for word in ("weights", "moments", "gradients", "activations", "peak", "fits", "tokens a second", "GPU-hours"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120
    assert not any(row.endswith(" ") for row in text.splitlines())


def test_flops_are_those_of_active_parameters() -> None:
    plan = make_plan(preset("moe-1b-7b"), H100, 8, micro_batch=1)
    # untied: the look-up of the embedding is no product
    assert plan.flops.matmul == 6 * (1_281_785_856 - 50_280 * 2048)
    assert plan.to_dict()["parameters"]["active"] == plan.parameters.active
    assert f"{plan.parameters.active:,}  8 of 64 experts a block" in show_plan("moe-1b-7b", plan)


def test_norms_are_what_a_model_without_norms_would_not_keep() -> None:
    plan = make_plan(preset("nano"), gpus["A10"])
    assert 0 < plan.norms < plan.memory.activations / 2
    assert plan.to_dict()["memory"]["norms"] == plan.norms


def test_without_triton_the_plan_says_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(preset("nano"), gpus["A10"])
    if HAS_TRITON:
        assert "Triton" not in show_plan("nano", plan)
    monkeypatch.setattr(measure, "HAS_TRITON", False)
    composed = make_plan(preset("nano"), gpus["A10"])
    assert "Triton is not installed" in show_plan("nano", composed)
    assert composed.memory.activations >= plan.memory.activations


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1b", "required: --gpu"),
        ("1bb --gpu A10", "no preset '1bb' (did you mean '1b'?)"),
        ("1b --gpu H10", "did you mean A10"),
        ("1b --gpu A10 --gpus 3", "a batch of 1024 sequences does not divide among 3 GPUs: give --batch-size 1026"),
        ("1b --gpu A10 --gpus 0", "'0' is not a whole number"),
        ("1b --gpu A10 --micro-batch 3", "micro-batches of 3 do not divide"),
        ("1b --gpu A10 --tokens many", "'many' is not a number of tokens"),
        ("1b --gpu A10 --tokens 1e99", "'1e99' is not a number of tokens"),
        ("1b --gpu A10 --mfu 2", "mfu=2 is not a share"),
        ("1b --gpu A10 --mfu nan", "mfu=nan is not a share"),
        ("1b --gpu A10 --mfu 0.9", "mfu=0.9 is too high"),
        ("1b --gpu A10 --context 0", "context=0 must be at least 1"),
        ("1b --gpu A10 --context 99999999999999999999", "is too large"),
        ("1b --gpu A10 --context 999999999", "100,000,000"),
        ("1b --gpu A10 --precision fp8", "precision='fp8'"),
        ("1b --gpu A10 --activation-checkpointing maybe", "activation_checkpointing='maybe'"),
        ("1b --gpu A10 --placement sd", "no placement 'sd'"),
        ("1b --gpu A10 --lr 3", "unknown argument --lr"),
        ("nano --gpu A10 --printed-shape", "nano is not one"),
    ],
)
def test_a_mistake_is_one_clear_line(line: str, expected: str, capsys) -> None:
    assert main(["plan", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdd: ")
    assert expected in err
    assert err.count("\n") == 1


def test_muon_saves_a_moment_of_the_matrices_and_costs_flops(capsys: pytest.CaptureFixture[str]) -> None:
    plans = {}
    for name in ("adamw", "muon"):
        assert main(["plan", "581m", "--gpu", "h100-sxm", "--micro-batch", "1", "--json", "--optimizer", name]) == 0
        plans[name] = json.loads(capsys.readouterr().out)
    # 581m has no bias, router or expert: all matrices of its blocks are Muon's
    saved = plans["adamw"]["memory"]["moments"] - plans["muon"]["memory"]["moments"]
    assert 4 * plans["muon"]["parameters"]["matrices"] < saved < 4.001 * plans["muon"]["parameters"]["matrices"]
    seconds = {name: plan["time"]["optimizer_seconds_per_step"] for name, plan in plans.items()}
    assert seconds["muon"] > seconds["adamw"]
    assert main(["plan", "581m", "--gpu", "h100-sxm", "--micro-batch", "1", "--optimizer", "muon"]) == 0
    assert "Muon and AdamW alone at least" in capsys.readouterr().out
