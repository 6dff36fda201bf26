"""transformers, without its progress bars and remarks on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from sdd.errors import require_extra


@contextmanager
def library(needed_by: str) -> Iterator[ModuleType]:
    """Import transformers, and keep it quiet.

    Args:
        needed_by: the command, for the message where it is not installed.

    Raises:
        MissingPackage: if it is not installed.
    """
    transformers, logging = require_extra("hf", "transformers", "transformers.utils.logging", needed_by=needed_by)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
