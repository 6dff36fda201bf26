"""Generation: greedy, sampled, stopped."""

import pytest
import torch
from helpers_models import drawn_tokens, tiny_model
from torch import Tensor

from sdd.models import LanguageModel, generate
from sdd.models.generate import sample


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("sdd", vocab_size=17)


@pytest.fixture
def prompt(model: LanguageModel) -> Tensor:
    return drawn_tokens(model.config, 4, batch=3)


def rollout(model: LanguageModel, tokens: Tensor, steps: int) -> Tensor:
    """Append the most likely token of the last `context` ones."""
    for _ in range(steps):
        logits = model(tokens[:, -model.config.context :])
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"top_k": 1, "top_p": 0.5}],
    ids=str,
)
def test_greedy_takes_the_most_likely_token_past_the_context_too(model: LanguageModel, prompt: Tensor, settings: dict):
    expected = rollout(model, prompt, 20)
    assert len(expected[:, 4:].unique()) > 3
    assert torch.equal(generate(model, prompt, 20, **settings), expected)


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
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(model: LanguageModel, prompt: Tensor, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, **{"max_new_tokens": 2, **settings})


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 0)])
def test_a_prompt_without_tokens_or_rows_is_refused(model: LanguageModel, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="the prompt has shape"):
        generate(model, torch.zeros(shape, dtype=torch.long), 2)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.04, 0.0625, 0.0025]),
        ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        ({"top_p": 0.6}, [0, 0.4, 0, 0.25, 0]),
        ({"top_p": 0.7}, [0, 0.4, 0.2, 0.25, 0]),
        ({"top_k": 3, "top_p": 0.6, "temperature": 2.0}, [0, 0.4**0.5, 0.2**0.5, 0.25**0.5, 0]),
    ],
    ids=str,
)
def test_draws_are_as_frequent_as_they_are_likely(settings: dict, weights: list[float]):
    n = 20_000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).log() + 3
    expected = torch.tensor(weights) / sum(weights)
    drawn = sample(logits.expand(n, -1), **settings, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (n, 1)
    observed = drawn.flatten().bincount(minlength=5) / n
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    chi_square = (n * (observed - expected).square() / expected)[possible].sum()
    assert chi_square < 18.5  # 4 degrees of freedom: p = 0.001
