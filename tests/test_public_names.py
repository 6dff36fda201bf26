"""`import sdd` and `sdd --help` import nothing heavy; public names come when they are first used."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import sdd

HEAVY = ("torch", "numpy", "pydantic", "rich", "tokenizers", "triton", "matplotlib")
ROOMS = ("conversion", "data", "functional", "kernels", "models", "nn", "placement", "probing", "train")


#: A Python with torch and its helpers, but nothing of ours, runs each line of code in a copy of itself.
COPIES = """
import os, sys
import torch, numpy
for code in sys.argv[1:]:
    if not os.fork():
        exec(code)
        print("found:", *sys.modules, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, code
"""


def imported_by(code: str) -> set[str]:
    """The modules that a fresh Python has imported after this code; the last line that it prints names them."""
    code += "; import sys; print(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def each_imports(codes: list[str]) -> list[set[str]]:
    """The modules after each of these, in a Python that had torch and no part of `sdd`."""
    done = subprocess.run([sys.executable, "-c", COPIES, *codes], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines() if line.startswith("found:")]


@pytest.mark.parametrize(
    "code",
    [
        "import sdd",
        "from sdd.commands.main import main; main(['--help'])",
        "from sdd.commands.main import main; main(['--version'])",
        "from sdd.commands.main import main; main(['trian'])",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert imported_by(code) & set(HEAVY) == set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of a process need fork")
def test_a_public_name_brings_neither_trainer_nor_models() -> None:
    names = ["SDDLinear", "Probe", "convert", "functional", "param_groups", "placements"]
    for name, modules in zip(names, each_imports([f"import sdd; sdd.{name}" for name in names]), strict=True):
        assert "sdd" in modules
        assert {"sdd.train", "sdd.models", "pydantic", "tokenizers"} & modules == set(), name


@pytest.mark.parametrize("name", sdd.__all__)
def test_a_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(sdd, name) is getattr(sdd, name)
    assert name in dir(sdd)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of a process need fork")
def test_a_room_is_an_attribute_after_import_sdd() -> None:
    codes = [f"import sdd; sdd.{room}.__name__" for room in ROOMS]
    for room, modules in zip(ROOMS, each_imports(codes), strict=True):
        assert f"sdd.{room}" in modules


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(sdd, "no_such_name")
    assert not hasattr(sdd, "_private")


def test_no_module_has_the_name_of_a_function_or_class() -> None:
    """Importing sdd/convert.py would put the module in the place of the function sdd.convert."""
    taken = {name for name in sdd.__all__ if find_spec(f"sdd.{name}") is not None}
    assert all(isinstance(getattr(sdd, name), ModuleType) for name in taken)


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(sdd.__file__).read_text())
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname or alias.name for node in imports for alias in node.names}
    assert seen == {*sdd.__all__, *ROOMS}
    for node in imports:
        for alias in node.names if node.module else ():
            assert getattr(import_module(f"sdd.{node.module}"), alias.name) is getattr(sdd, alias.name)
