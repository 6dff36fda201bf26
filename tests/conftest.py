import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings

# No deadline: the machine may be busy. Drawn inputs are fixed so that a red run can be repeated.
settings.register_profile("sdd", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("sdd")
# Where there is no GPU kernels run under Triton's interpreter, which has to be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    assert "triton" not in sys.modules, "Triton was imported before its interpreter could be asked for"
# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every command that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests are small: a second thread costs more than it gives, and much more on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no process waits for another's last file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for garbage only among what tests make: what collection imports stays, and is much to look through."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The session's own cache, of all its processes: tests neither see nor leave files in the user's."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDD_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process, made by the first Trainer or Accelerator: each test gets its own."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
