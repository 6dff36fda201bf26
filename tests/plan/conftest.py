from collections.abc import Iterator

import pytest

from helpers_interpreter import mend_interpreter
from sdd import kernels

mend_interpreter()


@pytest.fixture(autouse=True)
def _composed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plan counts the composed path, here and in the processes that a test starts."""
    monkeypatch.setenv("SDD_KERNELS", "composed")
    with kernels.use("composed"):
        yield
