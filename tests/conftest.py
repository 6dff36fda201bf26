import os
import signal
import sys
from collections.abc import Iterator

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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The session's own cache: tests neither see nor leave files in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
