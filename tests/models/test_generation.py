"""Generation: greedy, sampled, stopped, with and without a cache."""

from typing import Any

import pytest
import torch
from helpers_models import drawn_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdd import placements
from sdd.models import LanguageModel, generate, generate_stream
from sdd.models.generate import sample


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("sdd", vocab_size=17)


@pytest.fixture
def prompt(model: LanguageModel) -> Tensor:
    return drawn_tokens(model.config, 4, batch=3)


def rollout(model: LanguageModel, tokens: Tensor, steps: int) -> Tensor:
    """Append the most likely token after a row's window, written from the rule; one row and one token at a time."""
    context = model.config.context
    rows = []
    for row in tokens.tolist():
        first = max(0, len(row) - context)
        for _ in range(steps):
            if len(row) - first > context:
                first = len(row) - max(1, context // 2)
            logits = model(torch.tensor([row[first:]]))
            row.append(int(logits[0, -1].argmax()))
        rows.append(row)
    return torch.tensor(rows)


def streamed(model: LanguageModel, prompts: list[list[int]], steps: int, **settings: Any) -> list[list[int]]:
    """The new tokens of each row."""
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_stream(model, prompts, steps, **settings):
        for row, token in tokens.items():
            rows[row].append(token)
    return rows


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"top_k": 1, "top_p": 0.5}],
    ids=str,
)
def test_greedy_takes_the_most_likely_token_past_the_context_too(
    model: LanguageModel, prompt: Tensor, settings: dict, use_cache: bool
):
    expected = rollout(model, prompt, 30)
    assert len(expected[:, 4:].unique()) > 3
    assert torch.equal(generate(model, prompt, 30, use_cache=use_cache, **settings), expected)


@pytest.mark.parametrize("name", placements)
def test_a_cache_changes_no_token(name: str):
    model = tiny_model(name, dtype=torch.float64)
    prompts = [
        row[:length].tolist() for row, length in zip(drawn_tokens(model.config, 30, 4), (1, 3, 12, 30), strict=True)
    ]
    with_cache, without = (
        streamed(model, prompts, 25, generator=seeded(0, 1, 2, 3), top_p=0.9, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert with_cache == without
    assert len({token for row in without for token in row}) > 5


@settings(max_examples=20)
@given(
    st.lists(st.lists(st.integers(0, 28), min_size=1, max_size=16), min_size=1, max_size=5),
    st.integers(1, 7),
    st.booleans(),
)
def test_a_row_is_what_it_is_alone(prompts: list[list[int]], context: int, use_cache: bool):
    model = tiny_model("sdd", dtype=torch.float64, context=context, n_layers=2)
    seeds = range(len(prompts))
    ends = {"stop": lambda row, token: token < 3, "use_cache": use_cache}
    together = streamed(model, prompts, 14, generator=seeded(*seeds), **ends)
    for seed, prompt, row in zip(seeds, prompts, together, strict=True):
        assert [row] == streamed(model, [prompt], 14, generator=seeded(seed), **ends)
        assert all(token >= 3 for token in row[:-1])
        assert len(row) == 14 or row[-1] < 3


def test_with_a_cache_every_token_is_read_once_and_equal_prompts_together(model: LanguageModel, prompt: Tensor):
    read = []
    hook = model.embed.register_forward_hook(lambda module, tokens, output: read.append(tuple(tokens[0].shape)))
    prompts = [prompt[0].tolist()] * 2 + [prompt[1].tolist()]
    rows = streamed(model, prompts, 15, generator=seeded(0, 1, 2))
    hook.remove()
    # context 12: the ninth new token does not fit behind 4 + 8, so the last 6 are read anew, the newest by itself
    assert read == [(2, 4), *[(3, 1)] * 8, (3, 5), *[(3, 1)] * 6]
    assert rows[0] != rows[1]


def test_more_tokens_go_on_as_fewer_do(model: LanguageModel, prompt: Tensor):
    long, short = (generate(model, prompt, n, generator=torch.Generator().manual_seed(0)) for n in (20, 6))
    assert torch.equal(long[:, :10], short)


def test_weights_that_are_not_finite_are_said(prompt: Tensor):
    model = tiny_model("sdd", vocab_size=17)
    with torch.no_grad():
        model.head_weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, prompt, 2)


def test_a_prompt_longer_than_the_context_is_kept_and_its_end_is_read(model: LanguageModel):
    prompt = drawn_tokens(model.config, 30)
    tokens = generate(model, prompt, 5, temperature=0)
    assert torch.equal(tokens, rollout(model, prompt, 5))
    assert torch.equal(tokens[:, :30], prompt)
    assert torch.equal(tokens[:, 18:], generate(model, prompt[:, 18:], 5, temperature=0))


def test_a_seeded_generator_repeats_its_draws_and_leaves_the_global_one(model: LanguageModel, prompt: Tensor):
    before = torch.get_rng_state()
    first, again, other = (
        generate(model, prompt, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_draws_nothing(model: LanguageModel, prompt: Tensor):
    before = torch.get_rng_state()
    generate(model, prompt, 3, temperature=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_ends_at_eos_and_all_rows_end_the_generation(model: LanguageModel, prompt: Tensor):
    full = rollout(model, prompt, 40)
    for eos in full[0, 4:].unique().tolist():
        ends = [4 + row.tolist().index(eos) if eos in row else 43 for row in full[:, 4:]]
        expected = full[:, : max(ends) + 1].clone()
        for row, end in zip(expected, ends, strict=True):
            row[end + 1 :] = eos
        assert torch.equal(generate(model, prompt, 40, temperature=0, eos=eos), expected)


@given(st.sets(st.integers(0, 16), min_size=1), st.sampled_from([0, 0.7, 5.0]), st.sampled_from([None, 3, 17]))
@settings(max_examples=25)
def test_only_allowed_ids_are_drawn(allowed: set[int], temperature: float, top_k: int | None):
    model, mask = tiny_model("sdd", vocab_size=17), torch.zeros(17, dtype=torch.bool)
    mask[list(allowed)] = True
    prompt = drawn_tokens(model.config, 4, batch=3)
    made = generate(model, prompt, 6, temperature=temperature, top_k=top_k, allowed=mask, generator=seeded(1, 2, 3))
    assert set(made[:, 4:].unique().tolist()) <= allowed
    if len(allowed) == 17:
        free = generate(model, prompt, 6, temperature=temperature, top_k=top_k, generator=seeded(1, 2, 3))
        assert torch.equal(made, free)


def test_allowed_ids_are_those_of_the_model(model: LanguageModel, prompt: Tensor):
    for mask in (torch.ones(16, dtype=torch.bool), torch.zeros(17, dtype=torch.bool)):
        with pytest.raises(ValueError, match="are allowed, expected at least one"):
            generate(model, prompt, 1, allowed=mask)


def test_eos_in_the_prompt_does_not_end_a_row(model: LanguageModel, prompt: Tensor):
    expected = rollout(model, prompt, 1)
    assert torch.equal(generate(model, prompt, 1, temperature=0, eos=int(prompt[0, -1])), expected)


def test_no_new_tokens_leave_the_prompt(model: LanguageModel, prompt: Tensor):
    assert torch.equal(generate(model, prompt, 0), prompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"generator": seeded(0)}, "1 generators were given for 3 prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_settings_out_of_range_are_refused(model: LanguageModel, prompt: Tensor, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, **{"max_new_tokens": 2, **settings})


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 0)])
def test_a_prompt_without_tokens_or_rows_is_refused(model: LanguageModel, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="the prompt has shape"):
        generate(model, torch.zeros(shape, dtype=torch.long), 2)


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_an_empty_prompt_of_a_stream_is_refused_before_it_starts(model: LanguageModel, prompts: list):
    with pytest.raises(ValueError, match="expected at least one"):
        generate_stream(model, prompts, 2)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.04, 0.0625, 0.0025]),
        ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        ({"top_p": 0.6}, [0, 0.4, 0, 0.25, 0]),
        ({"top_p": 0.7}, [0, 0.4, 0.2, 0.25, 0]),
        ({"top_k": 3, "top_p": 0.6, "temperature": 2.0}, [0, 0.4**0.5, 0, 0.25**0.5, 0]),
    ],
    ids=str,
)
def test_draws_are_as_frequent_as_they_are_likely(settings: dict, weights: list[float]):
    n = 20_000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).log() + 3
    expected = torch.tensor(weights) / sum(weights)
    drawn = sample(logits.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(0)), **settings)
    assert drawn.shape == (n,)
    observed = drawn.bincount(minlength=5) / n
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    chi_square = (n * (observed - expected).square() / expected)[possible].sum()
    assert chi_square < 18.5  # 4 degrees of freedom: p = 0.001


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.5, 1 - 2**-24]),
    st.sampled_from([1e-30, 0.1, 1.0, 100.0]),
    st.integers(1, 9),
    st.floats(1e-9, 1),
)
def test_no_draw_takes_an_impossible_token(values: list[float], uniform: float, temperature: float, k: int, p: float):
    logits = torch.tensor([values])
    token = int(sample(logits, torch.tensor([uniform]), temperature, k, p))
    assert (logits > logits[0, token]).sum() < k
    assert ((logits - logits.max()) / temperature).softmax(-1)[0, token] > 0
