"""`sdd.functional` at the sites where norms are fused: SwiGLU, the residual stream, queries and keys, RoPE."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers_functional import HALF, drawn, randn, seeds
from sdd.functional import (
    alpha_size,
    apply_rope,
    qk_norm_rope,
    residual_norm,
    residual_postnorm,
    residual_prenorm,
    resolve_group,
    rope_tables,
    scaled_norm,
    sdd_linear,
    sdd_swiglu,
    sdd_swiglu_bare_up,
    swiglu,
)


def test_swiglu_sites_separate_and_joint():
    gate, up, alpha_gate, alpha_up = randn(0, (2, 3, 8), (2, 3, 8), (8,), (8,))
    separate = sdd_swiglu(gate, up, alpha_gate, alpha_up, eps=1e-3)
    torch.testing.assert_close(
        separate, swiglu(scaled_norm(gate, alpha_gate, eps=1e-3), scaled_norm(up, alpha_up, eps=1e-3))
    )
    joint = sdd_swiglu(gate, up, alpha_gate, alpha_up, joint=True, eps=1e-3)
    rms = (torch.cat([gate, up], -1).pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    scaled_gate, scaled_up = alpha_gate * gate / rms, alpha_up * up / rms
    torch.testing.assert_close(joint, scaled_gate * torch.sigmoid(scaled_gate) * scaled_up)


def test_joint_swiglu_sees_the_ratio_of_gate_and_up():
    gate, up, alpha_gate, alpha_up = randn(0, (4, 8), (4, 8), (8,), (8,))
    alphas = (alpha_gate, alpha_up)

    def unequal(**joint: bool) -> float:
        args = {"eps": 0.0, **joint}
        return float((sdd_swiglu(gate, 9 * up, *alphas, **args) - sdd_swiglu(gate, up, *alphas, **args)).abs().max())

    assert unequal(joint=False) < 1e-12 < unequal(joint=True)
    permuted = gate[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))]  # of the same mean square
    torch.testing.assert_close(
        sdd_swiglu(gate, permuted, *alphas, joint=True), sdd_swiglu(gate, permuted, *alphas, joint=False)
    )


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_swiglu_half_precision(dtype, joint):
    gate, up = randn(0, (4, 8), (4, 8), dtype=dtype)
    alpha_gate, alpha_up = randn(1, (8,), (8,), dtype=torch.float32)
    h = sdd_swiglu(2e3 * gate, 2e3 * up, alpha_gate, alpha_up, joint=joint)
    expected = sdd_swiglu(2e3 * gate.float(), 2e3 * up.float(), alpha_gate, alpha_up, joint=joint)
    assert h.dtype == dtype
    torch.testing.assert_close(h.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_residual_norm(dtype):
    z, residual = randn(0, (2, 3, 8), (2, 3, 8), dtype=dtype)
    alpha, post = randn(1, (8,), (8,), dtype=torch.float32)
    stream = residual_norm(z, residual, alpha, residual_scale=1.5, eps=1e-3)
    expected = 1.5 * residual.double() + scaled_norm(z.double(), alpha, eps=1e-3)
    rounding = 8 * torch.finfo(dtype).eps
    assert stream.dtype == dtype
    torch.testing.assert_close(stream.double(), expected, rtol=rounding, atol=rounding)
    normed = residual_norm(z, residual, alpha, post, residual_scale=1.5, eps=1e-3, post_eps=1e-2)
    torch.testing.assert_close(normed, scaled_norm(stream, post, eps=1e-2))
    assert residual_norm(z.bfloat16(), residual.float(), alpha).dtype == torch.float32


@pytest.mark.parametrize("post", [False, True])
def test_residual_norm_rounds_once(post):
    z, residual = randn(0, (64, 32), (64, 32), dtype=torch.bfloat16)
    alphas = randn(1, (32,), (32,), dtype=torch.float32)[: 1 + post]
    expected = residual_norm(z.double(), residual.double(), *(alpha.double() for alpha in alphas))
    unequal = (residual_norm(z, residual, *alphas) != expected.bfloat16()).float().mean()
    assert unequal < 0.01  # but where float32 falls on the other side of a tie


def test_residual_postnorm_returns_the_post_norm_and_its_copy():
    z, residual, alpha, post = randn(0, (2, 3, 8), (2, 3, 8), (8,), (8,))
    y, copy = residual_postnorm(z, residual, alpha, post, kept=residual.bfloat16(), dtype=torch.bfloat16)
    assert torch.equal(y, residual_norm(z, residual, alpha, post))
    assert torch.equal(copy, y.bfloat16())


def test_residual_prenorm_returns_the_stream_and_its_norm():
    z, residual, alpha, norm_alpha = randn(0, (2, 3, 8), (2, 3, 8), (8,), (8,))
    for branch_alpha in (alpha, None):
        options = {"residual_scale": 1.5, "eps": 1e-3}
        stream, normed = residual_prenorm(z, residual, branch_alpha, norm_alpha, norm_eps=1e-2, **options)
        assert torch.equal(stream, residual_norm(z, residual, branch_alpha, **options))
        assert torch.equal(normed, residual_norm(z, residual, branch_alpha, norm_alpha, post_eps=1e-2, **options))
    narrow = residual_prenorm(z.bfloat16(), residual.float(), alpha, norm_alpha, dtype=torch.bfloat16)
    assert [y.dtype for y in narrow] == [torch.float32, torch.bfloat16]


def test_without_alpha_there_is_no_norm():
    z, other, alpha = randn(0, (2, 3, 8), (2, 3, 8), (8,))
    torch.testing.assert_close(residual_norm(z, other, None, residual_scale=1.5), 1.5 * other + z)
    torch.testing.assert_close(sdd_swiglu(z, other, None, None), swiglu(z, other))
    torch.testing.assert_close(sdd_swiglu(z, other, alpha, None), swiglu(scaled_norm(z, alpha), other))
    cos, sin = rope_tables(3, 4)
    rotated = qk_norm_rope(z, None, cos, sin, n_heads=2)
    torch.testing.assert_close(rotated, apply_rope(z.unflatten(-1, (2, 4)).transpose(1, 2), cos, sin))


def test_gate_and_up_may_have_their_own_eps():
    gate, up, alpha_gate, alpha_up = randn(0, (4, 8), (4, 8), (8,), (8,))
    h = sdd_swiglu(gate, up, alpha_gate, alpha_up, eps=1e-1, up_eps=1e-3)
    expected = swiglu(scaled_norm(gate, alpha_gate, eps=1e-1), scaled_norm(up, alpha_up, eps=1e-3))
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("group", [None, 4, [(8, 2), (4, 0), (4, 4)]])
@pytest.mark.parametrize("shared", [False, True])
def test_eps_may_differ_from_row_to_row(group, shared):
    alpha_width = alpha_size(resolve_group(group, 16), shared)
    z, alpha, eps = randn(0, (2, 3, 16), (alpha_width,), (2, 3))
    eps = eps.square()
    together = scaled_norm(z, alpha, group=group, eps=eps)
    for i in range(2):
        for j in range(3):
            alone = scaled_norm(z[i, j], alpha, group=group, eps=eps[i, j].item())
            torch.testing.assert_close(together[i, j], alone)


@pytest.mark.parametrize("joint", [False, True])
def test_eps_of_swiglu_may_differ_from_row_to_row(joint):
    gate, up, alpha_gate, alpha_up, eps, up_eps = randn(0, (3, 8), (3, 8), (8,), (8,), (3,), (3,))
    eps, up_eps = eps.square(), None if joint else up_eps.square()
    alphas = (alpha_gate, alpha_up)
    together = sdd_swiglu(gate, up, *alphas, joint=joint, eps=eps, up_eps=up_eps)
    bare, _ = sdd_swiglu_bare_up(gate, up, *alphas, eps=eps)
    for i in range(3):
        own = {"eps": eps[i].item(), "up_eps": None if up_eps is None else up_eps[i].item()}
        torch.testing.assert_close(together[i], sdd_swiglu(gate[i], up[i], *alphas, joint=joint, **own))
        torch.testing.assert_close(bare[i], sdd_swiglu_bare_up(gate[i], up[i], *alphas, eps=own["eps"])[0])


def test_rows_of_queries_may_have_an_eps_and_positions_of_their_own():
    z, alpha, eps = randn(0, (3, 2, 8), (8,), (3, 2))
    eps, positions = eps.square(), torch.tensor([[[0, 1]], [[5, 6]], [[2, 3]]])
    cos, sin = (table[positions] for table in rope_tables(7, 4))
    assert cos.shape == (3, 1, 2, 4)
    together = qk_norm_rope(z, alpha, cos, sin, n_heads=2, group=4, eps=eps)
    for i in range(3):
        for t in range(2):
            row, own_cos, own_sin = z[i, t : t + 1], cos[i, 0, t : t + 1], sin[i, 0, t : t + 1]
            alone = qk_norm_rope(row, alpha, own_cos, own_sin, n_heads=2, group=4, eps=eps[i, t].item())
            torch.testing.assert_close(together[i, :, t : t + 1], alone)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("init_scale", [1.0, 0.1])
def test_a_bare_up_before_sdd_equals_the_normed_one(init_scale, eps):
    """A scale that the consumer's norm removes need not be computed, if the consumer's eps follows it."""
    shapes = (5, 16), (24, 16), (24, 16), (16, 24), (24,), (24,), (16,), (5, 16)
    x, v_gate, v_up, v_down, alpha_gate, alpha_up, alpha_down, dy = randn(0, *shapes)
    weights = [init_scale * (2.5 * 16) ** -0.5 * v for v in (v_gate, v_up, v_down)]
    leaves = [leaf.requires_grad_() for leaf in (x, *weights, alpha_gate, alpha_up, alpha_down)]
    x, v_gate, v_up, v_down, *_ = leaves
    kept = sdd_linear(sdd_swiglu(x @ v_gate.T, x @ v_up.T, alpha_gate, alpha_up, eps=eps), v_down, alpha_down, eps=eps)
    h, q = sdd_swiglu_bare_up(x @ v_gate.T, x @ v_up.T, alpha_gate, alpha_up, eps=eps)
    bare = scaled_norm(h @ v_down.T, alpha_down, eps=eps * (q + eps))
    torch.testing.assert_close(bare, kept, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in (bare, kept)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sdd_swiglu(*randn(0, (2, 8), (2, 6)), None, None), r"\[2, 8\] and \[2, 6\]"),
        (lambda: sdd_swiglu(*randn(0, (2, 8), (2, 8), (6,)), None), r"alpha has shape \[6\], expected \[8\]"),
        (lambda: sdd_swiglu(*randn(0, (2, 8), (2, 8), (8,)), None, joint=True), "give alpha_gate and alpha_up"),
        (lambda: sdd_swiglu(*randn(0, (2, 8), (2, 8), (8,), (8,)), joint=True, up_eps=1.0), "and one eps"),
        (lambda: sdd_swiglu(*randn(0, (2, 8), (2, 8), (8,), (8,)), joint=True, up_eps=torch.ones(2)), "and one eps"),
        (lambda: residual_norm(*randn(0, (2, 8), (3, 8)), None), r"\[2, 8\] and \[3, 8\]"),
        (lambda: residual_norm(*randn(0, (2, 8), (2, 8)), None, kept=torch.zeros(3, 8)), r"\[2, 8\] and \[3, 8\]"),
    ],
)
def test_shapes_that_do_not_fit_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("group", "size"), [(4, 4), (4, 12), (None, 12)])
def test_qk_norm_rope_is_norm_then_rotation_by_head(group, size):
    z, alpha = randn(0, (2, 5, 12), (size,))
    cos, sin = rope_tables(5, 4, theta=100.0)
    heads = qk_norm_rope(z, alpha, cos, sin, n_heads=3, group=group, eps=1e-3)
    assert heads.shape == (2, 3, 5, 4)
    normed = scaled_norm(z, alpha, group=group, eps=1e-3)
    for head in range(3):
        torch.testing.assert_close(heads[:, head], apply_rope(normed[..., 4 * head : 4 * head + 4], cos, sin))


def test_rope_is_a_complex_rotation():
    (x,) = randn(0, (7, 6))
    cos, sin = rope_tables(7, 6, theta=50.0)
    frequency = torch.tensor([50.0 ** (-2 * i / 6) for i in range(3)], dtype=torch.float64)
    angle = torch.arange(7)[:, None] * frequency
    rotated = torch.complex(x[:, :3], x[:, 3:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(
        apply_rope(x, cos, sin), torch.cat([rotated.real, rotated.imag], -1), rtol=1e-6, atol=1e-6
    )


@drawn
@given(seed=seeds, half=st.integers(1, 8), theta=st.sampled_from([100.0, 10_000.0, 500_000.0]))
def test_rope_scores_depend_on_the_distance_only(seed, half, theta):
    q, k = randn(seed, (2 * half,), (2 * half,))
    cos, sin = rope_tables(12, 2 * half, theta)
    scores = apply_rope(q.expand(12, -1), cos, sin) @ apply_rope(k.expand(12, -1), cos, sin).T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.diagonal(), (q @ k).expand(12), rtol=1e-5, atol=1e-5)


def test_rope_tables_are_exact_at_late_positions():
    cos, sin = rope_tables(131_072, 4, theta=10.0)
    for table, function in ((cos, math.cos), (sin, math.sin)):
        assert table.dtype == torch.float32
        expected = [function(131_071 * 10.0 ** (-i / 2)) for i in (0, 1, 0, 1)]
        torch.testing.assert_close(table[-1], torch.tensor(expected), rtol=0, atol=1e-6)
