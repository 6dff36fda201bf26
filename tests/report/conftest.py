from collections.abc import Callable
from pathlib import Path

import pytest

from helpers_runs import config_of, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, *, placement: str = "sdd", lr: float = 4e-3, seed: int = 0, **how: float) -> Path:
        return write_run(tmp_path / name, config_of(placement, seed=seed, lr=lr), **how)  # type: ignore[arg-type]

    return make
