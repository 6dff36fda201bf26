"""Every number of a config at the borders of its range: a run, or one line that says why not."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdd.commands.main import main
from sdd.train import config_io, preset

#: 2^62 and more: never so much memory that a machine has it, and never a run that ends.
INTEGERS = [-1, 0, 1, 2, 3, 2**62, 2**63 - 1, 2**63]
FLOATS = [-1.0, -0.0, 0.0, 5e-324, 1e-38, 1 - 2**-53, 1.0, 1 + 2**-52, 1e30, sys.float_info.max, math.inf, math.nan]
ENDLESS = ("steps", "sample_tokens")
SHAPE = "--model.n_layers 1 --model.d_model 16 --model.d_ff 16 --model.n_heads 2 --model.n_kv_heads 1"
SHAPE += " --model.vocab_size 64 --model.context 16 --model.moe.n_experts 2 --model.moe.top_k 1"
LENGTH = "--steps 2 --warmup 1 --data.batch_size 2 --eval_sequences 2 --sample_tokens 2 --probe_every 1 --threads 1"


def borders():
    """Each numeric field with each value to try."""
    for name, hint, _ in config_io.fields():
        kind = config_io.describe_type(hint).partition(" ")[0]
        for value in {"int": INTEGERS, "float": FLOATS}.get(kind, []):
            if name not in ENDLESS or not 3 < value < 2**63:
                yield name, value


BORDERS = list(borders())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a token file."""
    folder = tmp_path_factory.mktemp("borders")
    np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16).tofile(folder / "tokens.npy")
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


def test_every_numeric_field_is_tried():
    values = config_io.flatten(config_io.to_dict(preset("moe-nano")))
    numeric = {name for name, value in values.items() if type(value) in (int, float)}
    assert numeric <= {name for name, _ in BORDERS}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(border=st.sampled_from(BORDERS))
def test_a_value_at_a_border_trains_or_is_one_line(folder, tmp_path_factory, capsys, border):
    name, value = border
    data = f"--data {folder / 'tokens.npy'} --data.dtype uint16 --data.eos 0"
    out = tmp_path_factory.mktemp("run") / "run"
    capsys.readouterr()
    code = main([*f"train moe-nano {SHAPE} {data} {LENGTH}".split(), f"--{name}={value!r}", "--out", str(out)])
    last = capsys.readouterr().err.splitlines()[-1:]
    assert code in (0, 2, 3)
    assert not code or last[0].startswith("sdd: ")
    if isinstance(value, float) and not math.isfinite(value):
        assert code == 2
        assert name.rpartition(".")[2] in last[0]


@pytest.mark.parametrize("name", ["model.n_layers", "data.batch_size"])
def test_a_count_beyond_any_use_is_refused_at_once(name, capsys, tmp_path):
    assert main(["train", "nano", f"--{name}", str(2**63 - 1), "--out", str(tmp_path / "run")]) == 2
    assert f"{name.partition('.')[2]}={2**63 - 1}" in capsys.readouterr().err
