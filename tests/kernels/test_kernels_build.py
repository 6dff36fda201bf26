"""Every kernel compiles to machine code, GPU or not: the interpreter takes Python that the compiler does not.

`./dev kernels` compiles them all. What takes long here and looks at the same once more has the mark `ties`.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sdd.kernels

SOURCES = Path(sdd.kernels.__file__).parent / "fused"
ROOT = Path(__file__).parents[2]
CHECK = ROOT / "benchmarks" / "compile_kernels.py"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what Triton compiles, of this file's tests alone."""
    return tmp_path_factory.mktemp("triton")


def run(cache: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a process without interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.ties
def test_every_kernel_compiles(cache: Path) -> None:
    """The narrowest row and one that takes two passes: together they launch every kernel there is."""
    done = run(cache, CHECK, "--json", "--widths", "128", "32768")
    assert done.returncode == 0, done.stderr
    usages = json.loads(done.stdout)["kernels"]
    written = {
        f"{file.stem}.{name}"
        for file in SOURCES.glob("*.py")
        for name in re.findall(r"@jit\ndef (\w+_kernel)\(", file.read_text(encoding="utf-8"))
    }
    assert len(written) > 8
    assert {usage["kernel"] for usage in usages} == written
    assert all(0 < usage["registers"] <= 255 and usage["stack"] == 0 for usage in usages)
    for usage in usages:
        assert usage["warps"] <= usage["resident"] <= 64
        assert usage["resident"] * usage["registers"] * 32 <= 65_536  # the registers of a multiprocessor


def test_a_kernel_that_spills_must_be_listed(cache: Path) -> None:
    script = Path(__file__).with_name("spilling_kernel.py")
    alone, listed = run(cache, script), run(cache, script, "--listed")
    (usage,) = json.loads(alone.stdout)["kernels"]
    assert 16 <= usage["registers"] <= 255
    assert usage["stack"] >= 4 * (512 - 255)  # a thread holds 512 numbers, in at most 255 registers
    assert alone.returncode == 1
    assert "held at 2048" in alone.stderr
    assert "is not on the list of spills" in alone.stderr
    assert listed.returncode == 0, listed.stderr


def test_a_launch_must_not_count_on_more_programs_than_fit(cache: Path) -> None:
    crowded = run(cache, Path(__file__).with_name("spilling_kernel.py"), "--crowded")
    (usage,) = json.loads(crowded.stdout)["kernels"]
    assert usage["registers"] <= 128
    assert (usage["counted_on"], usage["resident"]) == (16, 8)
    assert crowded.returncode == 1
    assert "an SM holds 8 warps, and its launch counts on 16" in crowded.stderr


@pytest.mark.ties
def test_the_norm_of_experts_outputs_never_spills(cache: Path) -> None:
    done = run(cache, Path(__file__).with_name("compile_expert_norm.py"))
    assert done.returncode == 0, done.stderr
    usages = [usage for usage in json.loads(done.stdout)["kernels"] if usage["kernel"].startswith("expert_norm")]
    assert {usage["width"] for usage in usages} == {2048, 4096, 8192, 16_384}
    assert not any(usage["stack"] for usage in usages)
    assert all(usage["resident"] >= 32 for usage in usages)  # half of what a multiprocessor holds


def test_the_check_is_written_for_the_pinned_triton() -> None:
    pinned = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    assert f'TRITON = "{pinned[1]}"' in CHECK.read_text(encoding="utf-8")
