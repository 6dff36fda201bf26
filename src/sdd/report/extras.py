"""Packages that only the lab's pages need."""

import importlib

from sdd.errors import UserError

_REPORT = ("matplotlib", "jinja2", "scipy")


def require_report_extra() -> None:
    """Make sure that the extra `report` is installed.

    Raises:
        UserError: naming what is missing and how to install it.
    """
    for name in _REPORT:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"pages and figures need {error.name}: pip install 'sdd[report]'") from None
