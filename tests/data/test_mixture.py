import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.data import (
    Loader,
    MixturePart,
    TokenFile,
    TokenInfo,
    TokenizeSettings,
    builtin_tokenizer,
    resolve_data,
    tokenize,
    write_tokens,
)
from sdd.data.mixture import LONGEST_CYCLE, Interleaving, mixed_validation
from sdd.errors import UserError

weights = st.lists(st.integers(1, 60).map(Fraction), min_size=1, max_size=6)


def part(name: str, n_windows: int, context: int, first: int, weight: Fraction) -> MixturePart:
    """A source whose tokens are their own positions, `first` and on."""
    n_tokens = n_windows * context + 1
    tokens = np.arange(first, first + n_tokens, dtype=np.uint32)
    file = TokenFile(Path(f"{name}.npy"), tokens, TokenInfo(dtype="uint32", vocab_size=first + n_tokens))
    return MixturePart(name, (file,), weight)


def parts_of(sizes: list[int], shares: list[Fraction], context: int = 3) -> list[MixturePart]:
    pairs = zip(sizes, shares, strict=False)
    return [part(f"p{k}", size, context, 10_000 * k, share) for k, (size, share) in enumerate(pairs)]


@given(weights)
def test_any_first_samples_have_the_shares_within_one(shares: list[Fraction]):
    mixture = Interleaving(shares)
    n = np.arange(1, 3 * mixture.length + 1)
    sources, _ = mixture.assign(n - 1)
    for k, share in enumerate(shares):
        exact = np.array([float(share / sum(shares) * int(i)) for i in n])
        assert np.abs(np.cumsum(sources == k) - exact).max() < 1  # so of any consecutive ones, within two
    assert mixture.counts.tolist() == [share / sum(shares) * mixture.length for share in shares]


@given(weights, st.integers(0, 10**14), st.integers(1, 300))
def test_samples_of_a_source_are_numbered_without_gaps(shares: list[Fraction], start: int, n: int):
    mixture = Interleaving(shares)
    sources, numbers = mixture.assign(np.arange(start, start + n))
    before, after = mixture.taken(start), mixture.taken(start + n)
    for k in range(len(shares)):
        assert numbers[sources == k].tolist() == [*range(before[k], after[k])]


@settings(max_examples=8)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=4))
def test_odd_shares_are_rounded_to_the_longest_cycle(shares: list[float]):
    mixture = Interleaving([Fraction(repr(share)) for share in shares])
    assert mixture.length <= LONGEST_CYCLE
    assert np.abs(mixture.shares - np.array(shares) / sum(shares)).max() < 1 / LONGEST_CYCLE


def test_a_share_of_next_to_nothing_is_refused():
    with pytest.raises(UserError, match=r"weight number 2 of the mixture is 1\.0e-06 of the whole: at least 1/65,536"):
        Interleaving([Fraction(1), Fraction("1e-6")])


sizes = st.lists(st.integers(1, 30), min_size=6, max_size=6)


@settings(max_examples=25)
@given(sizes, weights, st.integers(0, 2**40), st.integers(1, 2))
def test_each_source_goes_through_its_own_epochs(sizes: list[int], shares: list[Fraction], seed: int, epochs: int):
    parts = parts_of(sizes, shares)
    loader = Loader(parts, batch_size=1, context=3, seed=seed)
    steps = 0
    while (loader._interleaving.taken(steps) < epochs * np.array(loader._part_windows)).any():
        steps += 1
    windows = np.concatenate([loader.windows(step) for step in range(steps)])
    first = 0
    for size in sizes[: len(parts)]:
        mine = windows[(windows >= first) & (windows < first + size)]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == [*range(first, first + size)]
        assert len(mine) >= size * epochs
        first += size
    rows = torch.cat([loader.batch(step) for step in range(min(steps, 30))])
    assert (rows.diff(dim=1) == 1).all()  # no window reaches over the end of a source


@given(sizes, weights, st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**9))
def test_a_batch_depends_on_its_step_alone_and_ranks_share_it(
    sizes: list[int], shares: list[Fraction], rows: int, world: int, step: int
):
    parts = parts_of(sizes, shares)
    whole = Loader(parts, rows * world, 3, seed=5).batch(step)
    split = [Loader(parts, rows * world, 3, seed=5, rank=r, world_size=world).batch(step) for r in range(world)]
    assert torch.equal(torch.cat(split), whole)
    single = Loader(parts, 1, 3, seed=5)
    assert torch.equal(torch.cat([single.batch(step * rows * world + i) for i in range(rows * world)]), whole)


@given(st.sets(st.integers(0, 20), max_size=6))
def test_skipped_batches_are_passed_over(skipped: set[int]):
    parts = parts_of([20, 30], [Fraction(7), Fraction(3)])
    plain, loader = Loader(parts, 4, 3), Loader(parts, 4, 3, skipped=sorted(skipped))
    left = [index for index in range(60) if index not in skipped]
    assert all(torch.equal(loader.batch(step), plain.batch(left[step])) for step in range(20))


def test_equal_sources_do_not_go_in_step():
    loader = Loader(parts_of([500, 500], [Fraction(1), Fraction(1)]), 100, 3)
    windows = loader.windows(0)
    assert (windows[windows < 500] != windows[windows >= 500] - 500).mean() > 0.9


def test_one_part_is_the_plain_loader():
    (only,) = parts_of([40], [Fraction(3)])
    assert torch.equal(Loader([only], 8, 3, 7).batch(9), Loader(only.files, 8, 3, 7).batch(9))
    assert Loader([only], 8, 3).describe(10) == []


def test_shares_and_epochs_are_described():
    loader = Loader(parts_of([10, 30], [Fraction(7), Fraction(3)]), 10, 3)
    assert loader.describe(10) == ["p0: 70.00% of the tokens, 7 epochs", "p1: 30.00% of the tokens, 1 epochs"]


def test_a_source_without_a_window_is_named():
    with pytest.raises(
        UserError, match="p1: too little data, a context of 3 needs 4 tokens in a file, the longest has 1"
    ):
        Loader(parts_of([10, 0], [Fraction(7), Fraction(3)]), 10, 3)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=4), st.data())
def test_held_out_tokens_have_the_shares_of_the_mixture(sizes: list[int], data: st.DataObject):
    shares = data.draw(st.lists(st.integers(1, 9).map(Fraction), min_size=len(sizes), max_size=len(sizes)))
    files = [part.files[0] for part in parts_of(sizes, shares)]
    mixed = mixed_validation(files, shares, 3)
    taken = np.bincount(mixed.tokens[:-1] // 10_000, minlength=len(sizes)) // 3
    assert mixed.n_windows(3) == taken.sum()
    scarcest = min(size * sum(shares) / share for size, share in zip(sizes, shares, strict=True))
    for got, size, share in zip(taken, sizes, shares, strict=True):
        assert 1 <= got <= size
        assert got in (1, int(scarcest * share / sum(shares) + 1e-9))


def counting(path: Path, n_tokens: int, vocab_size: int = 5000, eos: int | None = 0) -> Path:
    """A token file of 1, 2, 3, ..."""
    info = TokenInfo(dtype="uint16", vocab_size=vocab_size, eos=eos)
    return write_tokens(path, [np.arange(1, n_tokens + 1) % vocab_size], info).path


@pytest.mark.parametrize("spelled", ["list", "file", "folder"])
def test_mixtures_are_named_with_weights(tmp_path: Path, spelled: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "b").mkdir()
    counting(tmp_path / "a.npy", 4000)
    counting(tmp_path / "b" / "b.npy", 3000)
    sources = [{"path": "a.npy", "weight": 0.7}, {"path": "b", "weight": 0.3}]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
    spec = {
        "list": f"{tmp_path}/a.npy:0.7, {tmp_path}/b:0.3",
        "file": str(tmp_path / "mixture.json"),
        "folder": str(tmp_path),
    }[spelled]
    monkeypatch.chdir("/")
    data = resolve_data(spec, context=10)
    assert [(part.name, part.weight) for part in data.parts] == [("a", Fraction("0.7")), ("b", Fraction("0.3"))]
    assert data.name == "a:0.7,b:0.3"
    batch = Loader(data.parts, 10, 10).batch(0)
    assert batch.shape == (10, 11)
    assert 0.5 < np.mean(data.validation.tokens > 3500) < 0.8  # the tail of a, that of b ends at 3000


def test_the_fingerprint_knows_weights_and_says_what_changed(tmp_path: Path):
    a, b = counting(tmp_path / "a.npy", 4000), counting(tmp_path / "b.npy", 3000)
    data = resolve_data(f"{a}:1,{b}:1", context=10)
    assert resolve_data(f"{a}:1,{b}:1", context=10).fingerprint() == data.fingerprint()
    assert resolve_data(f"{a}:2,{b}:1", context=10).fingerprint() != data.fingerprint()
    before = json.loads(json.dumps(data.listing))
    counting(a, 4100)
    assert resolve_data(f"{a}:1,{b}:1", context=10).changes(before).startswith("a/a.npy had 3969 tokens, has 4059")
    counting(a, 4000, vocab_size=4500)
    counting(b, 3000, vocab_size=4500)
    text = resolve_data(f"{a}:1,{b}:1", context=10).changes(before)
    assert "had" not in text
    c = counting(tmp_path / "c.npy", 3000, vocab_size=4500)
    assert "b/b.npy is missing; c/c.npy is new" in resolve_data(f"{a}:1,{c}:1", context=10).changes(before)
    assert data.changes(before) == "order or weights differ"
    assert data.changes("nonsense") == data.changes(None) == data.changes([3]) == "they differ"


def test_text_and_the_built_in_corpus_can_be_mixed(tmp_path: Path):
    (tmp_path / "prose.txt").write_text("It was the best of times.\n" * 2000)
    data = resolve_data(f"classics:0.9,{tmp_path}/prose.txt:0.1", context=32)
    assert [part.name for part in data.parts] == ["classics", "prose"]
    assert data.tokenizer is builtin_tokenizer()
    out = tmp_path / "tokens"
    tokenize([str(tmp_path / "prose.txt")], out, TokenizeSettings(builtin_tokenizer()))
    assert resolve_data(f"classics:9,{out}:1", context=32).parts[0].weight == 9


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{a}:0.7,{b}", "b.npy has no weight but others have one"),
        ("{a}:x", r"the weight 'x' of .*a\.npy is no number: expected e\.g\. .*a\.npy:0\.5"),
        ("{a}:-1,{b}:1", r"the weight '-1' of .*a\.npy is no number"),
        ("{a}:0,{b}:1", r"a\.npy: the weight 0 must be above 0"),
        ("{a}:1,{c}:1", r"c \(vocab_size 60, eos 0\) and a \(vocab_size 5000, eos 0\) were made with two tokenizers"),
        ("{a}:1,classics:1", "were made with two tokenizers"),
        ("{a},classics", "classics and other data need weights"),
        ("{a}:1,{folder}/mixed:1", "mixed is a mixture itself"),
        ("{a}:1,{folder}/nothing.npy:1", "no data at .*nothing.npy: expected classics"),
        ("{a}:1e999,{b}:1", "weight 1e999 must be above 0 and below"),
        ("{folder}/bad.json", "bad.json: sources.0.weight: Input should be greater than 0; expected e.g."),
        ("{folder}/empty.json", "empty.json: no text to train on"),
    ],
)
def test_mixtures_that_cannot_be_are_one_line(tmp_path: Path, spec: str, message: str):
    a, b = counting(tmp_path / "a.npy", 4000), counting(tmp_path / "b.npy", 3000)
    c = counting(tmp_path / "c.npy", 3000, vocab_size=60)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "mixture.json").write_text('{"sources": [{"path": "../a.npy", "weight": 1}]}')
    (tmp_path / "bad.json").write_text('{"sources": [{"path": "a.npy", "weight": -1}]}')
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(UserError, match=message) as caught:
        resolve_data(spec.format(a=a, b=b, c=c, folder=tmp_path), context=10)
    assert "\n" not in str(caught.value)
