"""The mathematics: equality with the equations written out, their gradients, and the invariances that follow."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdd.functional import (
    alpha_size,
    apply_rope,
    norm,
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

HALF = [torch.bfloat16, torch.float16]
drawn = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)  # leading dimensions: none, empty, up to three
epsilons = st.sampled_from([0.0, 1e-6, 1e-2])


@st.composite
def parts_and_sharing(draw) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Consecutive parts, plain ones too, and whether alpha is shared by the groups of a part."""
    part = st.tuples(st.integers(1, 3), st.integers(1, 4), st.booleans())
    drawn_parts = draw(st.lists(part, min_size=1, max_size=4))
    parts = tuple((groups * width, width if normed else 0) for groups, width, normed in drawn_parts)
    return parts, draw(st.booleans())


def randn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def written_out(z: Tensor, alpha: Tensor, parts: tuple[tuple[int, int], ...], shared: bool, eps: float) -> Tensor:
    """`alpha * z / sqrt(mean(z^2) + eps)`, one group after the other."""
    columns = []
    for width, group in parts:
        part, z = z[..., :width], z[..., width:]
        if group == 0:
            columns.append(part)
            continue
        for start in range(0, width, group):
            piece = part[..., start : start + group]
            scale = alpha[:group] if shared else alpha[start : start + group]
            columns.append(scale * piece / (piece.pow(2).sum(-1, keepdim=True) / group + eps).sqrt())
        alpha = alpha[group if shared else width :]
    return torch.cat(columns, -1)


# --- the layer and its gradients ---


@drawn
@given(seed=seeds, shape=shapes, layout=parts_and_sharing(), eps=epsilons, bias=st.booleans())
def test_forward_is_the_equation_group_by_group(seed, shape, layout, eps, bias):
    parts, shared = layout
    width = sum(part for part, _ in parts)
    x, weight, alpha, b = randn(seed, (*shape, 5), (width, 5), (alpha_size(parts, shared),), (width,))
    y = sdd_linear(x, weight, alpha, b if bias else None, group=parts, eps=eps)
    expected = written_out(x @ weight.T, alpha, parts, shared, eps) + (b if bias else 0)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@drawn
@given(seed=seeds, tokens=st.integers(0, 6), n_groups=st.integers(1, 3), width=st.integers(1, 4), shared=st.booleans())
def test_gradients_are_the_analytic_ones(seed, tokens, n_groups, width, shared):
    size, eps = n_groups * width, 1e-3
    x, weight, alpha, dy = randn(seed, (tokens, 5), (size, 5), (width if shared else size,), (tokens, size))
    inputs = [tensor.requires_grad_() for tensor in (x, weight, alpha)]
    dx, dweight, dalpha = torch.autograd.grad(sdd_linear(*inputs, group=width, eps=eps), inputs, dy)

    with torch.no_grad():
        z = (x @ weight.T).reshape(tokens, n_groups, width)
        r = 1 / (z.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        n = z * r
        dy = dy.reshape(tokens, n_groups, width)
        scaled = dy * (alpha if shared else alpha.reshape(n_groups, width))
        dz = (r * (scaled - n * (scaled * n).mean(-1, keepdim=True))).reshape(tokens, size)
        per_group = (dy * n).sum(0)
    torch.testing.assert_close(dalpha, per_group.sum(0) if shared else per_group.reshape(size))
    torch.testing.assert_close(dweight, dz.T @ x)
    torch.testing.assert_close(dx, dz @ weight)


@pytest.mark.parametrize("group", [None, 3, [(3, 3), (6, 3), (3, 0)]])
def test_gradcheck(group):
    parts = resolve_group(group, 12)
    inputs = randn(0, (2, 2, 4), (12, 4), (alpha_size(parts, False),), (12,))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: sdd_linear(*args, group=group, eps=1e-2), inputs)


@drawn
@given(seed=seeds, c=st.floats(1e-3, 1e3), group=st.sampled_from([None, 2, 4]))
def test_without_eps_the_scale_of_the_weight_is_not_seen(seed, c, group):
    x, weight, alpha, dy = randn(seed, (7, 5), (8, 5), (8,), (7, 8))

    def run(weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.clone().requires_grad_()
        y = sdd_linear(x, weight, alpha, group=group, eps=0.0)
        return y.detach(), torch.autograd.grad(y, weight, dy)[0]

    y, dweight = run(weight)
    scaled_y, scaled_dweight = run(c * weight)
    torch.testing.assert_close(scaled_y, y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled_dweight * c, dweight, rtol=1e-8, atol=1e-8)
    assert abs((weight * dweight).sum()) <= 1e-10 * (weight * dweight).abs().sum()


@drawn
@given(seed=seeds, group=st.sampled_from([None, 2, 8]))
def test_output_has_the_scale_of_alpha(seed, group):
    x, weight = randn(seed, (6, 5), (8, 5))
    y = sdd_linear(x, weight, torch.full((8,), 0.25, dtype=torch.float64), group=group, eps=0.0)
    mean_square = y.unflatten(-1, (-1, group or 8)).square().mean(-1)
    torch.testing.assert_close(mean_square, torch.full_like(mean_square, 0.25**2))


def test_plain_parts_pass_unchanged_between_normed_ones():
    parts = [(4, 2), (3, 0), (6, 6)]
    x, weight, alpha = randn(0, (5, 4), (13, 4), (10,))
    q, plain, k = sdd_linear(x, weight, alpha, group=parts).split([4, 3, 6], -1)
    torch.testing.assert_close(q, sdd_linear(x, weight[:4], alpha[:4], group=2))
    torch.testing.assert_close(plain, x @ weight[4:7].T)
    torch.testing.assert_close(k, sdd_linear(x, weight[7:], alpha[4:]))


def test_shared_alpha_is_the_repeated_one():
    x, weight, alpha = randn(0, (5, 4), (12, 4), (3,))
    shared = sdd_linear(x, weight, alpha, group=3)
    torch.testing.assert_close(shared, sdd_linear(x, weight, alpha.repeat(4), group=3))
    by_parts = sdd_linear(x, weight, torch.cat([alpha, alpha]), group=[(6, 3), (6, 3)])
    torch.testing.assert_close(by_parts, shared)


def test_bias_comes_after_the_scale_and_outside_the_norm():
    x, weight, alpha, bias = randn(0, (5, 4), (8, 4), (8,), (8,))
    difference = sdd_linear(x, weight, alpha, 100 * bias) - sdd_linear(x, weight, alpha)
    torch.testing.assert_close(difference, (100 * bias).expand(5, 8))


def test_eps_is_inside_the_root():
    z = torch.full((1, 4), 1e-3, dtype=torch.float64)
    torch.testing.assert_close(norm(z, eps=1e-6), torch.full_like(z, 1 / math.sqrt(2)))


def test_zero_rows_give_zero_and_finite_gradients():
    z = torch.zeros(2, 4, requires_grad=True)
    y = scaled_norm(z, torch.ones(4))
    y.sum().backward()
    assert not y.any()
    torch.testing.assert_close(z.grad, torch.full((2, 4), 1e3))  # 1/sqrt(eps)


# --- layouts and dtypes ---


@drawn
@given(seed=seeds, shape=shapes)
def test_leading_dimensions_are_tokens(seed, shape):
    x, weight, alpha = randn(seed, (*shape, 4), (6, 4), (6,))
    y = sdd_linear(x, weight, alpha, group=3)
    assert y.shape == (*shape, 6)
    torch.testing.assert_close(y, sdd_linear(x.reshape(-1, 4), weight, alpha, group=3).reshape(*shape, 6))


def test_non_contiguous_inputs():
    x, weight, alpha, bias = randn(0, (4, 3, 5), (4, 6), (12,), (12,))
    strided = sdd_linear(x.transpose(0, 2), weight.T, alpha[::2], bias[::2], group=3)
    packed = sdd_linear(
        x.transpose(0, 2).contiguous(), weight.T.contiguous(), alpha[::2].clone(), bias[::2].clone(), group=3
    )
    torch.testing.assert_close(strided, packed)


@drawn
@given(
    seed=seeds,
    dtype=st.sampled_from(HALF),
    magnitude=st.sampled_from([1e-6, 1e-3, 1.0, 200.0, 1.5e4]),
    layout=parts_and_sharing(),
)
def test_half_precision_equals_float32_rounded(seed, dtype, magnitude, layout):
    # 1.5e4 squared overflows fp16, 1e-6 squared underflows it
    parts, shared = layout
    width = sum(part for part, _ in parts)
    z, dy = randn(seed, (5, width), (5, width), dtype=dtype)
    z = (z.clamp(-4, 4) * magnitude).requires_grad_()
    alpha, bias = (a.requires_grad_() for a in randn(seed, (alpha_size(parts, shared),), (width,), dtype=torch.float32))
    inputs = (z, alpha, bias)
    wide = (z.detach().float().requires_grad_(), *(a.detach().requires_grad_() for a in (alpha, bias)))
    y = scaled_norm(*inputs, group=parts, eps=1e-20)
    expected = scaled_norm(*wide, group=parts, eps=1e-20)
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    for gradient, reference in zip(
        torch.autograd.grad(y, inputs, dy, materialize_grads=True),
        torch.autograd.grad(expected, wide, dy.float(), materialize_grads=True),
        strict=True,
    ):
        assert torch.equal(gradient, reference.to(gradient.dtype))


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.float16, 1e-7), (torch.bfloat16, 1e-15)])
def test_squares_beyond_half_precision_do_no_harm(dtype, value):
    z = torch.tensor([[value, -value]]).to(dtype)
    assert torch.equal(scaled_norm(z, torch.ones(2), eps=0.0), torch.tensor([[1.0, -1.0]]).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_layer_applies_alpha_and_bias_before_the_cast(dtype):
    x, weight = randn(0, (9, 16), (8, 16), dtype=dtype)
    alpha, bias = randn(1, (8,), (8,), dtype=torch.float32)
    y = sdd_linear(x, weight, alpha, bias)
    expected = scaled_norm(F.linear(x, weight).float(), alpha, bias)
    assert torch.equal(y, expected.to(dtype))


def test_float64_stays_float64():
    (z,) = randn(0, (3, 64))
    n = norm(z, eps=0.0)
    assert n.dtype == torch.float64
    assert (n.square().mean(-1) - 1).abs().max() < 1e-14
    assert scaled_norm(z, torch.ones(64)).dtype == torch.float64


def test_autocast_multiplies_in_bf16_and_norms_in_float32():
    x, weight, alpha, bias = (a.requires_grad_() for a in randn(0, (3, 16), (8, 16), (8,), (8,), dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = sdd_linear(x, weight, alpha, bias, group=4)
    assert torch.equal(y, sdd_linear(x.bfloat16(), weight.bfloat16(), alpha, bias, group=4))
    y.float().sum().backward()
    assert [a.grad.dtype for a in (x, weight, alpha, bias)] == [torch.float32] * 4


# --- groups ---


def test_resolve_group():
    assert resolve_group(None, 12) == ((12, 12),)
    assert resolve_group(4, 12) == ((12, 4),)
    assert resolve_group([(8, 4), (4, 0)], 12) == ((8, 4), (4, 0))
    assert alpha_size(((8, 4), (4, 0), (6, 6)), shared=False) == 14
    assert alpha_size(((8, 4), (4, 0), (6, 6)), shared=True) == 10


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (5, r"group=5 does not divide the 12 output features"),
        (0, r"group=0 does not divide the 12"),
        (-3, r"group=-3 does not divide"),
        ([(8, 4)], r"add up to 8, expected the 12 output features"),
        ([(8, 3), (4, 0)], r"part \(8, 3\) is not a whole number of groups"),
        ([(12, -1)], r"part \(12, -1\)"),
        ([], r"add up to 0, expected the 12"),
    ],
)
def test_groups_that_do_not_fit_say_so(group, message):
    with pytest.raises(ValueError, match=message):
        resolve_group(group, 12)


@pytest.mark.parametrize(
    ("group", "size", "message"),
    [
        (None, 4, r"\[4\], expected \[12\]"),
        (3, 4, r"\[4\], expected \[12\] .* or \[3\]"),
        ([(6, 3), (6, 0)], 12, r"\[12\], expected \[6\] .* or \[3\]"),
        ([(12, 0)], 12, r"\[12\], expected \[0\]"),
    ],
)
def test_an_alpha_that_does_not_fit_says_so(group, size, message):
    with pytest.raises(ValueError, match=message):
        scaled_norm(torch.ones(2, 12), torch.ones(size), group=group)


# --- the fused sites ---


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


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("init_scale", [1.0, 0.1])
def test_a_bare_up_before_sdd_equals_the_normed_one(init_scale, eps):
    """What the consumer's norm removes need not be computed, if its eps follows."""
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


# --- tokens never mix ---

_ALPHA = torch.linspace(0.5, 1.5, 8)
_WEIGHT = torch.linspace(-1, 1, 64).reshape(8, 8).sin()
TOKEN_WISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sdd_linear": lambda x: sdd_linear(x, _WEIGHT, _ALPHA, _ALPHA),
    "sdd_linear by head": lambda x: sdd_linear(x, _WEIGHT, _ALPHA[:4], group=4),
    "sdd_linear by part": lambda x: sdd_linear(x, _WEIGHT, _ALPHA[:6], group=[(2, 2), (4, 2), (2, 0)]),
    "sdd_swiglu": lambda x: sdd_swiglu(x, x.flip(-1), _ALPHA, _ALPHA),
    "sdd_swiglu joint": lambda x: sdd_swiglu(x, x.flip(-1), _ALPHA, _ALPHA, joint=True),
    "sdd_swiglu_bare_up": lambda x: sdd_swiglu_bare_up(x, x.flip(-1), _ALPHA, _ALPHA)[0],
    "residual_norm": lambda x: residual_norm(x, x.flip(-1), _ALPHA, _ALPHA),
    "qk_norm_rope": lambda x: qk_norm_rope(x, _ALPHA, *rope_tables(5, 4), n_heads=2).transpose(1, 2).flatten(-2),
}


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_tokens_never_mix(name):
    (x,) = randn(0, (2, 5, 8), dtype=torch.float32)
    changed = x.clone()
    changed[1, 3] *= -7
    before, after = TOKEN_WISE[name](x), TOKEN_WISE[name](changed)
    same = (before == after).all(-1)
    assert same.sum() == 9
    assert not same[1, 3]
