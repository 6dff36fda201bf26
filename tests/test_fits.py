"""Each section of docs/fits.md runs as it stands, after what the page begins with."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("sybil", reason="runs the code of pages: extra test")

from helpers_pages import LANGUAGES, Page, languages

PAGE = Path(__file__).parents[1] / "docs" / "fits.md"
BEGINNING, *SECTIONS = re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
#: Sections that compile, start processes or import much, which takes more than a few seconds.
LONG = {
    "torch.compile",
    "DDP",
    "FSDP2",
    "Accelerate with FSDP2",
    "Lightning Fabric",
    "Fabric with ModelParallelStrategy",
    "ONNX",
}
#: The packages that a section imports.
PACKAGES = {"ONNX": ["onnx", "onnxscript"], "torchao int8": ["torchao"]}


def title(section: str) -> str:
    return section.partition("\n")[0].removeprefix("## ")


def marked(section: str) -> object:
    ties = title(section) in LONG or title(section) in PACKAGES
    return pytest.param(section, marks=pytest.mark.ties if ties else (), id=title(section).replace(" ", "-"))


@pytest.mark.filterwarnings("default")  # of other libraries
@pytest.mark.parametrize("section", [marked(section) for section in SECTIONS])
def test_a_converted_model_fits_a_tool(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [package for package in PACKAGES.get(title(section), []) if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: extra ties")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("page.md").write_text(BEGINNING + section, encoding="utf-8")
    assert Page(Path("page.md")).run() == []


def test_every_block_says_how_it_is_run() -> None:
    assert languages(PAGE) <= set(LANGUAGES)
