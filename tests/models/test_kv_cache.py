"""Reading on with a cache equals reading everything at once."""

import pytest
import torch
from helpers_models import drawn_tokens, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdd import placements
from sdd.models import KVCache, LanguageModel

EXACT = {"rtol": 1e-12, "atol": 1e-12}
every_placement = pytest.mark.parametrize("name", placements)


def read(model: LanguageModel, tokens: Tensor, cache: KVCache) -> Tensor:
    with torch.no_grad():
        return model(tokens, cache=cache)


@every_placement
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1}, {"n_kv_heads": 4}, {"tie_embeddings": True}], ids=str)
def test_a_prompt_and_then_single_tokens_have_the_logits_of_the_whole(name: str, shape: dict):
    model = tiny_model(name, dtype=torch.float64, **shape)
    tokens = drawn_tokens(model.config, batch=3)
    cache = KVCache(model.config, 3)
    parts = [read(model, part, cache) for part in tokens.split([5, 1, 1, 1, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), **EXACT)
    assert cache.lengths == [12, 12, 12]
    assert {keys.dtype for keys in cache.keys + cache.values} == {torch.float64}


@settings(max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda cuts: sum(cuts) <= 12))
def test_any_cutting_into_pieces_has_the_logits_of_the_whole(cuts: list[int]):
    model = tiny_model("sdd-released", dtype=torch.float64)
    tokens = drawn_tokens(model.config, sum(cuts))
    cache = KVCache(model.config, 2)
    parts = [read(model, part, cache) for part in tokens.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), **EXACT)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_rows_of_different_lengths_are_what_each_is_alone(lengths: list[int], new: int, random):
    model = tiny_model("sdd", dtype=torch.float64)
    tokens = drawn_tokens(model.config, batch=len(lengths), seed=random.randrange(1000))
    cache = KVCache(model.config, len(lengths))
    if any(lengths):
        read(model, tokens[:, : max(lengths)], cache)
        cache.lengths = list(lengths)  # forget what is beyond each
    following = drawn_tokens(model.config, new, batch=len(lengths), seed=random.randrange(1000))
    logits = read(model, following, cache)
    for row, length in enumerate(lengths):
        alone = model(torch.cat([tokens[row, :length], following[row]])[None])[0, length:]
        torch.testing.assert_close(logits[row], alone, **EXACT)
    assert cache.lengths == [length + new for length in lengths]


def test_rows_can_be_left_out_repeated_and_replaced():
    model = tiny_model("sdd", dtype=torch.float64)
    tokens = drawn_tokens(model.config, 7, batch=3)
    cache, other = KVCache(model.config, 3), KVCache(model.config, 1, length=2)
    read(model, tokens[:, :6], cache)
    read(model, tokens[:1, 2:4], other)
    cache.select([2, 0, 2])
    cache.put([0], other)
    assert cache.lengths == [2, 6, 6]
    logits = read(model, tokens[:, 6:], cache)
    histories = [tokens[0, 2:4], tokens[0, :6], tokens[2, :6]]
    for row, history in enumerate(histories):
        alone = model(torch.cat([history, tokens[row, 6:]])[None])[0, -1:]
        torch.testing.assert_close(logits[row], alone, **EXACT)


def test_under_autocast_keys_are_bfloat16_and_logits_those_of_autocast():
    model = tiny_model("sdd")
    tokens = drawn_tokens(model.config)
    cache = KVCache(model.config, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens).detach()
        parts = [read(model, part, cache) for part in tokens.split([5, *[1] * 7], 1)]
    assert {keys.dtype for keys in cache.keys + cache.values} == {torch.bfloat16}
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0.05, atol=0.1)


def test_storage_is_allocated_once_and_only_for_the_asked_length():
    config = tiny_config("sdd")
    model = tiny_model("sdd")
    cache = KVCache(config, 2, length=8)
    read(model, drawn_tokens(config, 5), cache)
    before = [keys.data_ptr() for keys in cache.keys + cache.values]
    read(model, drawn_tokens(config, 1), cache)
    assert [keys.data_ptr() for keys in cache.keys + cache.values] == before
    assert [tuple(keys.shape) for keys in cache.keys + cache.values] == [(2, 2, 8, 4)] * 6


def test_what_does_not_fit_is_refused():
    model = tiny_model("sdd")
    full, small = KVCache(model.config, 2), KVCache(model.config, 2, length=4)
    read(model, drawn_tokens(model.config), full)
    read(model, drawn_tokens(model.config, 3), small)
    with pytest.raises(ValueError, match="13 tokens was given, the model's context is 12"):
        read(model, drawn_tokens(model.config, 1), full)
    with pytest.raises(ValueError, match="2 tokens after 3 were given, the cache has room for 4"):
        read(model, drawn_tokens(model.config, 2), small)
    with pytest.raises(ValueError, match="tokens of 2 rows were given, the cache has 3"):
        read(model, drawn_tokens(model.config), KVCache(model.config, 3))
    with pytest.raises(ValueError, match="leave out document_eos or cache"):
        model(drawn_tokens(model.config), document_eos=0, cache=KVCache(model.config, 2))
