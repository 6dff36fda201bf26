"""The residual addition with the norms before and after it, on every path."""

from typing import Any

import pytest
import torch
from helpers_kernels import DEVICE, EXAMPLES, PATHS, check, drawn, dtypes, layouts, leading, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdd import functional as sdd_F
from sdd import kernels
from sdd.kernels.dispatch import HAS_TRITON


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    shape=leading,
    width=st.integers(1, 40),
    normed=st.booleans(),
    row_eps=st.booleans(),
    post=st.sampled_from(["none", "post-norm", "post-norm, copy", "pre-norm"]),
    kept_dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 1.7]),
    dtype=dtypes,
    stream_dtype=dtypes,
    layout=layouts,
    gradient_layout=layouts,
)
def test_values_and_gradients(
    path, seed, shape, width, normed, row_eps, post, kept_dtype, scale, dtype, stream_dtype, layout, gradient_layout
):
    residual = drawn(seed + 1, *shape, width, dtype=stream_dtype, layout=layout)
    arguments: dict[str, Any] = {
        "z": drawn(seed, *shape, width, dtype=dtype, layout=layout),
        "residual": residual,
        "alpha": drawn(seed + 2, width) if normed else None,
        "residual_scale": scale,
        "eps": drawn(seed + 3, *shape).square() if row_eps and normed else 1e-3,
    }
    if post == "pre-norm":
        arguments |= {"norm_alpha": drawn(seed + 4, width), "norm_eps": 1e-2, "dtype": dtype}
        # the kernels keep the stream as it is stored, or its norm in the dtype of the result
        check(path, "residual_prenorm", sdd_F.residual_prenorm, arguments, seed + 5, gradient_layout, path == "triton")
        return
    kept = None if kept_dtype is None else residual.to(kept_dtype)
    arguments |= {"post_alpha": None if post == "none" else drawn(seed + 4, width), "post_eps": 1e-2, "kept": kept}
    if post == "post-norm, copy":
        arguments["dtype"] = dtype
    name = "residual_postnorm" if post == "post-norm, copy" else "residual_norm"
    differs = path == "triton" and kept is not None and post != "none"
    reference = {"residual_norm": at_kept, "residual_postnorm": lambda **args: (at_kept(**args),) * 2}[name]
    one = arguments.get("dtype") == stream_dtype  # one tensor twice: its gradients are added in its dtype
    check(path, name, reference if differs else getattr(sdd_F, name), arguments, seed + 5, gradient_layout, one)


def at_kept(*, z, residual, alpha, post_alpha, post_eps, kept, **options: Any) -> Tensor:
    """The value of the post-norm, and its gradients with s summed from what is kept of the residual."""
    s = sdd_F.residual_norm(z, residual, alpha, **options)
    return _PostNormAt.apply(s, sdd_F.residual_norm(z, kept, alpha, **options).detach(), post_alpha, post_eps)


class _PostNormAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, s_kept, post_alpha, eps):
        r = (s.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(r, r * s_kept, post_alpha)
        return post_alpha * (r * s)

    @staticmethod
    def backward(ctx, dy):
        r, n, post_alpha = ctx.saved_tensors
        ds = post_alpha * dy
        ds = r * (ds - n * (ds * n).mean(-1, keepdim=True))
        return ds, None, (dy * n).reshape(-1, len(post_alpha)).sum(0), None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["residual_postnorm", "residual_prenorm"])
@pytest.mark.parametrize("used", [0, 1])
def test_either_output_alone(path, name, used):
    leaves = [drawn(0, 3, 12), drawn(1, 3, 12), drawn(2, 12), drawn(3, 12)]
    found = []
    for path_, dtype in ((path, torch.float32), ("composed", torch.float64)):
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        with kernels.use(path_):
            y = getattr(kernels, name)(*own, dtype=torch.float16)[used]
        dy = drawn(4, 3, 12).half().to(y.dtype)
        found.append(torch.autograd.grad(y, own, dy, materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=4e-3, atol=4e-3)


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@settings(max_examples=max(2, EXAMPLES // 6), deadline=None)
@given(
    seed=seeds,
    # the interpreter cuts norm(s) off, all numbers in one direction: only a GPU rounds it
    kind=st.sampled_from(["post-norm", "pre-norm"] if DEVICE == "cuda" else ["post-norm"]),
    normed=st.booleans(),
    branch=st.floats(0.01, 10),
    radial=st.floats(0, 3),
)
def test_a_stream_kept_in_bfloat16_costs_no_more_than_a_gradient_in_bfloat16(seed, kind, normed, branch, radial):
    """Against float64, the error of all gradients is that of rounding the incoming one, or below."""
    z, residual = branch * drawn(seed, 16, 128), drawn(seed + 1, 16, 128)
    alpha, norm_alpha = 1 + 0.3 * drawn(seed + 2, 128), 1 + 0.3 * drawn(seed + 3, 128)
    leaves = [z, residual, *([alpha] if normed else []), norm_alpha]
    normal = sdd_F.norm(sdd_F.residual_norm(z, residual, alpha if normed else None))
    # some of the gradient along the stream, which the norm takes out again
    dy = drawn(seed + 4, 16, 128) + radial * normal.float()
    rounding = dy - dy.bfloat16().float()
    dy = dy.bfloat16().float()  # what arrives

    def gradients(namespace: Any, dtype: torch.dtype, dy: Tensor) -> list[Tensor]:
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        given = own[0], own[1], own[2] if normed else None, own[-1]
        if kind == "pre-norm":
            _, y = namespace.residual_prenorm(*given, dtype=torch.bfloat16 if dtype == torch.float32 else None)
        else:
            y = namespace.residual_norm(*given, kept=own[1].detach().bfloat16())
        return [part.double() for part in torch.autograd.grad(y, own, dy.to(y.dtype))]

    exact = gradients(sdd_F, torch.float64, dy)
    with kernels.use("triton"):
        ours = gradients(kernels, torch.float32, dy)
    rounded = gradients(sdd_F, torch.float64, dy + rounding)
    for a, b, c in zip(ours, rounded, exact, strict=True):
        assert (a - c).norm() <= 1.3 * (b - c).norm() + 1e-5 * c.norm()
