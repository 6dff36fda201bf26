"""Layouts of processes: which fit, which are refused, and what is proposed instead."""

import math
import re
from dataclasses import asdict, replace

import pytest
from helpers_layout import models, options_of
from hypothesis import assume, given
from hypothesis import strategies as st

from sdd.errors import UserError
from sdd.models import model_presets
from sdd.parallel import ParallelConfig, layouts

sizes = st.builds(
    ParallelConfig, st.integers(1, 4), st.integers(0, 4), st.integers(1, 5), context=st.sampled_from([1, 1, 2, 3])
)


@given(sizes, st.integers(1, 24), models)
def test_a_layout_fits_or_is_refused_with_options_that_make_it_one_that_fits(asked, processes, model):
    try:
        layout = asked.resolved(processes, model)
    except UserError as error:
        assert "\n" not in str(error)
        proposed = replace(asked, **options_of(str(error).rpartition(": ")[2]))
        layout = proposed.resolved(processes, model)
        assert layout in list(layouts(processes, model))
    else:
        assert all(value in (0, asdict(layout)[name]) for name, value in asdict(asked).items())
    assert math.prod(layout.sizes.values()) == processes
    assert model.n_heads % layout.tensor == model.n_kv_heads % layout.tensor == model.d_ff % layout.tensor == 0


@given(st.integers(1, 64), models)
def test_by_default_all_processes_shard(processes, model):
    layout = ParallelConfig().resolved(processes, model)
    assert layout == ParallelConfig(shard=processes)
    assert layout.is_plain


@given(st.integers(1, 4), st.integers(2, 6), models)
def test_a_layout_that_fits_is_proposed_by_nothing_but_itself(replicate, shard, model):
    layout = ParallelConfig(replicate=replicate, shard=shard)
    assume(replicate > 1)
    assert layout.resolved(replicate * shard, model) == layout
    assert not layout.is_plain


@pytest.mark.parametrize(
    ("asked", "processes", "line"),
    [
        ({"tensor": 4}, 4, "parallel.tensor=4 does not divide model.n_kv_heads=2; the nearest layout of 4 processes "
         "that fits: --parallel.tensor 2"),
        ({"tensor": 3}, 4, "parallel (tensor 3) is for 3 processes, and this run has 4; the nearest layout of 4 "
         "processes that fits: --parallel.tensor 2"),
        ({"tensor": 2}, 1, "parallel (tensor 2) is for 2 processes, and this run has 1; the nearest layout of 1 "
         "process that fits: --parallel.tensor 1"),
        ({"replicate": 2, "shard": 3}, 4, "parallel (replicate 2, shard 3) is for 6 processes, and this run has 4; "
         "the nearest layout of 4 processes that fits: --parallel.replicate 2 --parallel.shard 2"),
    ],
)  # fmt: skip
def test_messages_of_refused_layouts(asked, processes, line):
    with pytest.raises(UserError, match=re.escape(line)):
        ParallelConfig(**asked).resolved(processes, model_presets["nano"])


@pytest.mark.parametrize(
    ("asked", "context", "line"),
    [
        ({"tensor": 2}, 127, "parallel.context * parallel.tensor = 2 does not divide model.context=127 tokens"),
        ({"context": 2}, 126, "2 * parallel.context = 4 does not divide model.context=126 tokens"),
        ({"context": 2, "tensor": 4}, 132, "parallel.context * parallel.tensor = 8 does not divide model.context=132"),
    ],
)
def test_the_tokens_of_a_sequence_must_divide(asked, context, line):
    model = replace(model_presets["nano"], context=context, n_kv_heads=4)
    with pytest.raises(UserError, match=re.escape(line)):
        ParallelConfig(**asked).resolved(math.prod(asked.values()), model)


@pytest.mark.parametrize("name", ["replicate", "tensor", "expert", "context"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        ParallelConfig(**{name: 0})
