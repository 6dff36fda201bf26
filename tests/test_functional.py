"""The mathematics: equality with the equations written out, their gradients, and the invariances that follow."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers_functional import HALF, drawn, randn, seeds
from sdd.functional import (
    alpha_size,
    norm,
    qk_norm_rope,
    residual_norm,
    resolve_group,
    rope_tables,
    scaled_norm,
    sdd_linear,
    sdd_swiglu,
    sdd_swiglu_bare_up,
)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)  # leading dimensions: none, empty, up to three
epsilons = st.sampled_from([0.0, 1e-6, 1e-2])


@st.composite
def parts_and_sharing(draw) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Consecutive parts, plain ones too, and whether alpha is shared by the groups of a part."""
    part = st.tuples(st.integers(1, 3), st.integers(1, 4), st.booleans())
    drawn_parts = draw(st.lists(part, min_size=1, max_size=4))
    parts = tuple((groups * width, width if normed else 0) for groups, width, normed in drawn_parts)
    return parts, draw(st.booleans())


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
    parts = resolve_group([(8, 4), (4, 0)], 12)
    assert resolve_group(parts, 12) is parts, "a layer resolves its groups once"
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
