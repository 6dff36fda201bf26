"""The entry point: Ctrl-C at any moment, and names that are nearly right."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.errors import nearest
from sdd.train import config_io

INTERRUPT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[0]:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())

from sdd.__main__ import main
sys.argv = ["sdd", "train", "nano"]
sys.exit(main())
""".replace("name == sys.argv[0]", "name == WANTED")


@pytest.mark.parametrize("module", ["sdd.commands.main", "sdd.commands.parser", "torch", "sdd.data.loader"])
def test_ctrl_c_during_an_import_is_one_line(module):
    code = INTERRUPT.replace("WANTED", repr(module))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "sdd: interrupted\n")


FIELDS = [f"--{name}" for name, _, _ in config_io.fields()]


@given(st.sampled_from(FIELDS), st.data())
def test_an_option_with_one_letter_missing_is_found(option, data):
    last = option.rpartition(".")[2].lstrip("-")
    where = data.draw(st.integers(0, len(last) - 1))
    assert (len(last) < 4) or nearest("--" + last[:where] + last[where + 1 :], FIELDS)


@pytest.mark.parametrize("word", ["--foo", "--gpu", "--epochs", "--verbose", "--learning-rate", "--config", "--resume"])
def test_nothing_far_fetched_is_offered(word):
    assert nearest(word, FIELDS) == ""


@pytest.mark.parametrize(("word", "meant"), [("--batch_size", "--data.batch_size"), ("--layers", "--model.n_layers")])
def test_a_field_is_found_by_its_last_part(word, meant):
    assert meant in nearest(word, FIELDS)
