"""Every kernel compiles to machine code, GPU or not: the interpreter takes Python that the compiler does not."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sdd.kernels

SOURCES = Path(sdd.kernels.__file__).parent / "fused"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_every_kernel_compiles(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("build_kernels.py")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    built = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    written = {
        (file.stem, name)
        for file in SOURCES.glob("*.py")
        for name in re.findall(r"@jit\ndef (\w+_kernel)\(", file.read_text(encoding="utf-8"))
    }
    assert len(written) > 8
    assert built == written
