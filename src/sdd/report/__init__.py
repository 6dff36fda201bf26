"""One run's page, or that of several beside each other: curves, heat maps, verdict, live server."""

from sdd.errors import require_extra


def require_report_extra() -> None:
    """Check that the extra `report` is installed.

    Raises:
        UserError: with the missing package and how to install it.
    """
    require_extra("report", "matplotlib", "jinja2", "scipy", needed_by="a page with figures")
