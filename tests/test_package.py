"""What the package's metadata and its code say of each other."""

import tomllib
from pathlib import Path

import pytest

import sdd
from sdd.errors import DISTRIBUTION, MissingPackage, require_extra

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_the_advice_to_install_names_the_distribution():
    assert PROJECT["name"] == DISTRIBUTION
    with pytest.raises(MissingPackage, match=r"pip install 'sdd-torch\[data\]'$"):
        require_extra("data", "no_such_package", needed_by="x.parquet")


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT
    assert "version" in PROJECT["dynamic"]
    assert sdd.__version__
