"""Presets, parameter counts, and the shapes that are refused."""

import pytest
from helpers_models import tiny_config

from sdd.models import as_printed, count_parameters, model_presets
from sdd.placement import placements


def parameters(layers: int, kv_heads: int, vocabulary: int) -> int:
    """Matrices and the tied embedding of the published shapes: d_model 2048, d_ff 8192, heads of 64."""
    attention = 2 * 2048 * 2048 + 2 * 2048 * 64 * kv_heads
    return layers * (attention + 3 * 2048 * 8192) + vocabulary * 2048


@pytest.mark.parametrize(
    ("name", "layers", "published"),
    [
        ("581m", 8, 581_124_096),
        ("1b", 16, 1_059_274_752),
        ("1.5b", 24, 1_537_425_408),
        ("2b", 32, 2_015_576_064),
    ],
)
def test_published_labels_count_matrices_and_embeddings(name: str, layers: int, published: int):
    count = count_parameters(model_presets[name])
    assert count.published == published == parameters(layers, 4, 50_280)
    assert count.head == 0
    assert count.embedding == 50_280 * 2048


@pytest.mark.parametrize(
    ("name", "layers", "printed"),
    [
        ("581m", 8, 691_908_608),
        ("1b", 16, 1_178_447_872),
        ("1.5b", 24, 1_664_987_136),
        ("2b", 32, 2_151_526_400),
    ],
)
def test_printed_shapes_count_more(name: str, layers: int, printed: int):
    assert count_parameters(as_printed(name)).published == printed == parameters(layers, 8, 100_278)


@pytest.mark.parametrize("name", ["nano", "3b"])
def test_only_published_shapes_were_printed(name: str):
    with pytest.raises(KeyError):
        as_printed(name)


@pytest.mark.parametrize(
    ("name", "in_a_block", "in_the_model"),
    [
        # d_model 16, d_ff 20, heads of 4, keys and values of 8
        ("prenorm", 2 * 16, 16),
        ("prenorm-qk", 2 * 16 + 2 * 4, 16),
        ("postnorm", 2 * 16, 16),
        ("deepnorm", 2 * 16, 16),
        ("olmo2", 16 + 8 + 2 * 16, 16),
        ("peri", 4 * 16, 2 * 16),
        ("hybrid", 16 + 8 + 8 + 16, 16),
        ("qkv-norm", 16 + 8 + 8 + 16, 16),
        ("sdd-paper", 2 * 16 + (16 + 8 + 8 + 16) + (20 + 20 + 16), 16),
        ("sdd-released", 2 * 16 + (4 + 4 + 16 + 16) + (20 + 20 + 16), 16),
        ("sdd-prenorm", 2 * 16 + (16 + 8 + 8 + 16) + (20 + 20 + 16), 16),
        ("sdd", 2 * 16 + (4 + 4 + 16) + 16, 16),
    ],
)
def test_norms_and_alphas_are_counted_apart(name: str, in_a_block: int, in_the_model: int):
    count = count_parameters(tiny_config(name))
    assert count.scales == 3 * in_a_block + in_the_model
    assert count.matrices == 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 20)
    assert count.embedding == count.head == 29 * 16
    assert count.total == count.scales + count.published
    assert count.published == count.matrices + count.embedding + count.head


@pytest.mark.parametrize("name", model_presets)
def test_presets_use_the_default_placement(name: str):
    assert model_presets[name].placement == placements["sdd"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"d_model": 18}, "n_heads=4 does not divide d_model=18"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
        ({"d_model": 12}, "head_dim=3 .* must be even"),
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny_config("sdd", **changes)
