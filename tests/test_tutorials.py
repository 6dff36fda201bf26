"""README and pages do what they say: every block of code is run, in order, each page in a folder of its own."""

import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("sybil", reason="runs the code of pages: extra test")

from helpers_pages import LANGUAGES, Page, languages, same_words, skipped

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = [ROOT / "README.md", *sorted((DOCS / "tutorials").glob("*.md"))]
REFERENCE = sorted(set(DOCS.glob("*.md")) - {DOCS / "fits.md"})  # test_fits runs that one, section by section
PAGES = [*TUTORIALS, *REFERENCE]
#: Pages of more than about 20 seconds of a core.
LONG = {
    "generation",
    "peft",
    "torchtitan",
    *(f"tutorials/{name}" for name in ("choose", "cluster", "diagnose", "faq", "pretrain", "serve", "study")),
}
#: A package that a page is about, and the suite does without.
NEEDS = {"peft": "peft", "torchtitan": "torchtitan"}
#: How many blocks of a tutorial are not run.
SKIPPED = {"README": 3, **{f"tutorials/{name}": 1 for name in ("choose", "cluster", "study")}}
SKIPPED |= {"tutorials/pretrain": 2, "tutorials/serve": 3}
#: An indented block of Markdown, which no test can tell from a formula, and which holds a command or Python.
HIDDEN = re.compile(
    r"^    (sdd|\./dev|torchrun|python3?|pip|import|from|with|for|def|print)\b|^    [\w.]+ = [\w.]+\.\w+\(", re.M
)


def page_name(path: Path) -> str:
    return str(path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).with_suffix(""))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.ties if page_name(page) in LONG else ()) for page in PAGES],
    ids=page_name,
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (package := NEEDS.get(page_name(page))) is not None:
        pytest.importorskip(package, reason=f"the extra {package} is not installed")
        warnings.simplefilter("default")  # of its own
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # modules that a page writes
    assert Page(page).run() == skipped(page)


@pytest.mark.parametrize("page", TUTORIALS, ids=page_name)
def test_few_blocks_of_a_tutorial_are_not_run(page: Path) -> None:
    assert len(skipped(page)) == SKIPPED.get(page_name(page), 0)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_of_a_page_says_how_it_is_run(page: Path) -> None:
    assert languages(page) <= set(LANGUAGES)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_command_of_a_page_hides_in_an_indented_block(page: Path) -> None:
    fenced = re.compile(r"^```.*?^```|<!--.*?-->", re.M | re.S)
    assert HIDDEN.findall(fenced.sub("", page.read_text(encoding="utf-8"))) == []


def page_of(tmp_path: Path, text: str) -> Page:
    (tmp_path / "page.md").write_text(text)
    return Page(tmp_path / "page.md")


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfalse\ntrue\n```\n",
        "```sh\nfalse | true\n```\n",
        "<!-- exits: 2 -->\n```sh\ntrue\n```\n",
        "<!-- exits: 2 -->\n```sh\nexit 2\n```\n\n```sh\nexit 2\n```\n",
        "```sh\necho one\n```\n\n```text\ntwo\n```\n",
        "```python\nprint('one')\n```\n\n```text\none\ntwo\n```\n",
        "```python\nassert False\n```\n",
    ],
)
def test_a_page_that_does_not_do_what_it_says_fails(text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        page_of(tmp_path, text).run()


def test_blocks_run_in_order_and_what_is_not_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write = "```sh\necho 1 > one\n```\n\n"
    read = (
        "```python\nfrom pathlib import Path\n\nprint('read', Path('one').read_text())\n```\n\n```text\nread 2\n```\n\n"
    )
    skip = '<!-- skip: next "too long" -->\n```sh\nexit 1\n```\n\n```python\nassert Path\n```\n'
    page = page_of(tmp_path, write + read + skip)
    assert page.run() == ["too long"] == skipped(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("loss 6.51, 1,024 tokens", "loss  7.1,\n 96 tokens", True),
        ("loss 6.51...", "loss 7.1\nmore\nlines\n", True),
        ("one\n...\ntwo", "one\ntwo", True),
        ("one\n...\ntwo", "one\n\nmore\n\ntwo", True),
        ("one\n...\ntwo", "one\nmore\n", False),
        ("Seeds: 0.\n...\ntwo", "Seeds: 1.\ntwo", True),
        ("1.5e-05 and -3", "2e+10 and 4", True),
        ("loss 6.51", "loss 6.51 more", False),
        ("loss 6.51", "gain 6.51", False),
    ],
)
def test_what_a_page_shows_has_the_words_that_were_printed(shown: str, printed: str, same: bool) -> None:
    assert same_words(shown, printed) is same
