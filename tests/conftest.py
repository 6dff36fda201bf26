from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# No deadline: the machine may be busy. Drawn inputs are fixed so that a red run can be repeated.
settings.register_profile("sdd", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("sdd")
torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The session's own cache: tests neither see nor leave files in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
