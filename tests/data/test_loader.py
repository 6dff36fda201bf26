from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdd.data import Loader, TokenFile, TokenInfo, eval_windows, permute
from sdd.errors import BadData, UserError


def token_file(n_tokens: int, first: int = 0) -> TokenFile:
    """A file whose tokens are their own positions."""
    tokens = np.arange(first, first + n_tokens, dtype=np.uint32)
    return TokenFile(Path("drawn.npy"), tokens, TokenInfo(dtype="uint32", vocab_size=first + n_tokens))


seeds = st.integers(-(2**70), 2**70)
sizes = st.lists(st.integers(0, 80), min_size=1, max_size=4).filter(lambda n: max(n) > 7)


def files_of(n_tokens: list[int]) -> list[TokenFile]:
    return [token_file(n, first=1000 * i) for i, n in enumerate(n_tokens)]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n: int, key: int):
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


@given(st.integers(2**40, 2**62), st.integers(0, 2**64 - 1))
def test_permute_of_a_huge_range_stays_inside_and_is_injective(n: int, key: int):
    index = np.arange(n - 500, n)
    image = permute(index, n, key)
    assert ((image >= 0) & (image < n)).all()
    assert len(np.unique(image)) == len(index)


def test_permute_looks_random():
    n = 20_011
    image = permute(np.arange(n), n, 1)
    other = permute(np.arange(n), n, 2)
    correlations = [np.corrcoef(image, np.arange(n)), np.corrcoef(image, other), np.corrcoef(image[1:], image[:-1])]
    assert max(abs(c[0, 1]) for c in correlations) < 5 / n**0.5  # five standard deviations of chance
    assert np.mean(image == np.arange(n)) < 1e-3
    # Of pairs that follow each other, the distance modulo n is uniform: chi-squared over 100 bins, 99 +- 14.
    counts, _ = np.histogram(np.diff(image) % n, bins=100, range=(0, n))
    assert 50 < ((counts - n / 100) ** 2 / (n / 100)).sum() < 160


def test_all_orders_of_a_few_are_about_as_likely():
    orders = [tuple(permute(np.arange(4), 4, key)) for key in range(4800)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    assert counts.min() > 100
    assert counts.max() < 300


@given(sizes, seeds, st.integers(1, 7), st.integers(1, 3))
def test_each_epoch_visits_each_window_once(n_tokens: list[int], seed: int, context: int, epochs: int):
    loader = Loader(files_of(n_tokens), batch_size=1, context=context, seed=seed)
    batches = torch.cat([loader.batch(step) for step in range(loader.n_windows * epochs)])
    targets = [1000 * i + 1 + t for i, n in enumerate(n_tokens) for t in range((n - 1) // context * context)]
    for rows in batches.split(loader.n_windows):
        assert sorted(rows[:, 1:].flatten().tolist()) == targets  # each token but the first (and a rest) once
        assert (rows.diff(dim=1) == 1).all()  # no window reaches over the end of a file
    assert loader.epoch(loader.n_windows) == 1


@given(sizes, seeds, st.integers(1, 12), st.lists(st.integers(0, 10**12), max_size=6))
def test_a_batch_depends_on_its_step_alone(n_tokens: list[int], seed: int, batch_size: int, steps: list[int]):
    def batch(loader: Loader, step: int) -> list[list[int]]:
        return loader.batch(step).tolist()

    one = Loader(files_of(n_tokens), batch_size, 7, seed)
    forward = [batch(one, step) for step in steps]
    backward = [batch(Loader(files_of(n_tokens), batch_size, 7, seed), step) for step in reversed(steps)]
    assert forward == backward[::-1]
    # The stream of samples does not depend on the batch size.
    single = Loader(files_of(n_tokens), 1, 7, seed)
    assert all(
        rows == [batch(single, step * batch_size + j)[0] for j in range(batch_size)]
        for step, rows in zip(steps, forward, strict=True)
    )


@given(sizes, seeds, st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_the_ranks_together_have_the_global_batch(n_tokens: list[int], seed: int, rows: int, world: int, step: int):
    files = files_of(n_tokens)
    whole = Loader(files, rows * world, 7, seed).batch(step)
    parts = [Loader(files, rows * world, 7, seed, rank=r, world_size=world).batch(step) for r in range(world)]
    assert torch.equal(torch.cat(parts), whole)
    assert all(len(part) == rows for part in parts)


@given(st.sets(st.integers(0, 40)))
def test_skipped_batches_are_passed_over(skipped: set[int]):
    plain = Loader([token_file(200)], 2, 7)
    loader = Loader([token_file(200)], 2, 7, skipped=sorted(skipped))
    expected = [index for index in range(80) if index not in skipped]
    assert [loader.batch_index(step) for step in range(30)] == expected[:30]
    assert torch.equal(loader.batch(5), plain.batch(expected[5]))


@given(st.sets(st.integers(0, 40), max_size=8), st.integers(0, 40))
def test_skipping_the_current_batch_leaves_the_past_alone(skipped: set[int], step: int):
    before = Loader([token_file(200)], 2, 7, skipped=sorted(skipped))
    current = before.batch_index(step)
    after = Loader([token_file(200)], 2, 7, skipped=sorted({*skipped, current}))
    assert [after.batch_index(s) for s in range(step)] == [before.batch_index(s) for s in range(step)]
    assert after.batch_index(step) == before.batch_index(step + 1)


def test_seeds_and_epochs_have_their_own_order():
    orders = [Loader([token_file(1001)], 100, 10, seed).windows(step).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_batches_are_int64_rows_of_input_and_target():
    batch = Loader([token_file(100)], 3, 7).batch(0)
    assert batch.dtype == torch.int64
    assert batch.shape == (3, 8)


def test_errors():
    with pytest.raises(UserError, match="a context of 7 needs 8 tokens in a file, the longest has 7"):
        Loader([token_file(7), token_file(3)], 2, 7)
    with pytest.raises(UserError, match=r"6 rows does not divide among 4 .* --data\.batch_size 8"):
        Loader([token_file(100)], 6, 7, world_size=4)
    with pytest.raises(UserError, match=r"drawn\.npy: too little data, a context of 7 needs 8 tokens"):
        eval_windows(token_file(7), None, 7)
    wrong = TokenFile(Path("x"), np.full(20, 9, np.uint16), TokenInfo(dtype="uint16", vocab_size=9))
    with pytest.raises(BadData, match="token id 9"):
        Loader([wrong], 1, 7).batch(0)


@given(st.integers(8, 300), st.none() | st.integers(1, 50))
def test_evaluation_windows_are_apart_and_spread(n_tokens: int, n: int | None):
    file = token_file(n_tokens)
    windows = eval_windows(file, n, 7)
    count = file.n_windows(7)
    assert len(windows) == (count if n is None else min(n, count))
    targets = windows[:, 1:].flatten()
    assert len(targets.unique()) == len(targets)
    gaps = torch.cat([windows[:, 0], torch.tensor([count * 7])]).diff()
    assert gaps.max() - gaps.min() <= 7
    assert torch.equal(windows, eval_windows(file, n, 7))
