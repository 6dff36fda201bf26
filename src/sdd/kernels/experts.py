"""Operations on rows that are sorted by expert, each group of rows with its expert's own matrix.

Rows of one expert are consecutive. `ends` (int32 `[E]`) says where each expert's rows end, so that no shape depends on
the routing: nothing is padded, nothing waits for a GPU, and torch.compile sees fixed shapes.

Shape suffixes: N tokens, K experts a token, M = N*K rows, E experts, I input features, O output features.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from sdd.functional import Eps, check_swiglu, statistics_dtype, swiglu


class Order(NamedTuple):
    """The order of rows sorted by expert: each row is a pair of a token and one of its experts.

    Attributes:
        pairs_M: the pair `n*K + k` of each row, int64.
        tokens_M: the token n of each row, int64.
        experts_M: the expert of each row, ascending, int64.
        ends_E: the end of each expert's rows, int32.
        top_k: K.
    """

    pairs_M: Tensor
    tokens_M: Tensor
    experts_M: Tensor
    ends_E: Tensor
    top_k: int

    @property
    def counts_E(self) -> Tensor:
        """The number of rows of each expert, int32."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1))


def sort_by_expert(experts_NK: Tensor, n_experts: int) -> Order:
    """Sort all pairs of token and expert by expert; tokens keep their order."""
    experts_M, pairs_M = experts_NK.flatten().sort(stable=True)
    experts_E = torch.arange(n_experts, device=experts_M.device)
    ends_E = torch.searchsorted(experts_M, experts_E, right=True, out_int32=True)
    return Order(pairs_M, pairs_M // experts_NK.shape[1], experts_M, ends_E, experts_NK.shape[1])


def dispatch(x_NI: Tensor, order: Order) -> Tensor:
    """Copy each token into the rows of its experts: `[N, I]` to `[M, I]`."""
    return _Dispatch.apply(x_NI, order.pairs_M, order.tokens_M, order.top_k)  # pyright: ignore[reportReturnType]


def by_row(pairs_NK: Tensor, order: Order) -> Tensor:
    """Put one number for each pair of a token and an expert into the order of rows: `[N, K]` to `[M]`."""
    return _Permute.apply(pairs_NK.flatten(), order.pairs_M)  # pyright: ignore[reportReturnType]


def collect(y_MO: Tensor, order: Order) -> Tensor:
    """Sum the rows of each token: `[M, O]` to `[N, O]`, in the dtype of y."""
    return _Collect.apply(y_MO, order.pairs_M, order.tokens_M, order.top_k)  # pyright: ignore[reportReturnType]


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`y = W_e x` for each row, e being its expert; under autocast in its dtype, like `torch.nn.functional.linear`.

    Args:
        x_MI: rows sorted by expert.
        weight_EOI: the experts' matrices.
        ends_E: the end of each expert's rows, int32; the last is M.

    Returns:
        `[M, O]`. It can be differentiated once.
    """
    device = x_MI.device.type
    if torch.is_autocast_enabled(device) and x_MI.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_MI, weight_EOI = x_MI.to(dtype), weight_EOI.to(dtype)
    return _GroupedLinear.apply(x_MI.contiguous(), weight_EOI, ends_E)  # pyright: ignore[reportReturnType]


def rows_of(alpha_EO: Tensor, order: Order) -> Tensor:
    """The alpha of each row's expert, `[M, O]`. It can be differentiated once."""
    return _RowsOf.apply(alpha_EO, order.experts_M, order.ends_E)  # pyright: ignore[reportReturnType]


def expert_scaled_norm(
    z: Tensor, alpha: Tensor, order: Order, weights: Tensor | None = None, *, eps: Eps = 1e-6
) -> Tensor:
    """`y = w * alpha_e * norm(z)` for each row, e being its expert and w the row's weight, 1 unless given.

    With n = norm(z) = r*z, and m = mean(alpha_e*dy*n) over the O features of a row,

        dz = w * r * (alpha_e*dy - n*m)          dalpha_e = sum over the expert's rows of w*dy*n
        dw = O * m                               deps     = -r^2/2 * w*dw

    Args:
        z: rows sorted by expert, `[M, O]`.
        alpha: the experts' scales, `[E, O]`.
        order: the expert of each row.
        weights: `[M]`, at least float32, one for each row: the router's weights in this order; or None.
        eps: added to the mean square, inside the root; a number, or `[M]` with one value for each row.

    Returns:
        `[M, O]` in the dtype of z; alpha and w are applied in at least float32 before the cast. It can be
        differentiated once.

    Raises:
        ValueError: if shapes do not fit.
    """
    check_expert_norm(z, alpha, order, weights)
    return _ExpertScaledNorm.apply(z, alpha, weights, order.experts_M, order.ends_E, eps)  # pyright: ignore[reportReturnType]


def expert_swiglu(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    order: Order,
    *,
    joint: bool = False,
    eps: float = 1e-6,
    up_eps: float | None = None,
) -> Tensor:
    """`silu(alpha_e * norm(z_g)) * (alpha_e * norm(z_u))` for each row, e being its expert.

    Args:
        z_gate: rows sorted by expert, `[M, F]`.
        z_up: the same rows, `[M, F]`.
        alpha_gate: `[E, F]`, or None if the gate projections have no norm.
        alpha_up: `[E, F]`, or None if the up projections have no norm.
        order: the expert of each row.
        joint: one norm group over `z_gate | z_up`, see `sdd.functional.sdd_swiglu`.
        eps: added to the mean square, inside the root.
        up_eps: the same for the norm of the up projections; None for eps.

    Returns:
        `[M, F]` in the dtype of z. It can be differentiated once.

    Raises:
        ValueError: if shapes do not fit, or a joint group lacks an alpha or has two eps.
    """
    check_expert_swiglu(z_gate, z_up, alpha_gate, alpha_up, order, joint, eps, up_eps)
    if joint and alpha_gate is not None and alpha_up is not None:
        z_M2F, alpha_E2F = torch.cat([z_gate, z_up], -1), torch.cat([alpha_gate, alpha_up], -1)
        return swiglu(*expert_scaled_norm(z_M2F, alpha_E2F, order, eps=eps).chunk(2, -1))
    gate = z_gate if alpha_gate is None else expert_scaled_norm(z_gate, alpha_gate, order, eps=eps)
    if alpha_up is None:
        return swiglu(gate, z_up)
    return swiglu(gate, expert_scaled_norm(z_up, alpha_up, order, eps=eps if up_eps is None else up_eps))


def expert_swiglu_bare_up(
    z_gate: Tensor, z_up: Tensor, alpha_gate: Tensor | None, alpha_up: Tensor, order: Order, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`silu(alpha_e * norm(z_g)) * (alpha_e * z_u)` for each row, and `mean(z_u^2)`: the up norm is left out.

    See `sdd.functional.sdd_swiglu_bare_up`; arguments as in `expert_swiglu`, the mean square at least float32 `[M]`.
    """
    check_expert_swiglu(z_gate, z_up, alpha_gate, alpha_up, order)
    gate = z_gate if alpha_gate is None else expert_scaled_norm(z_gate, alpha_gate, order, eps=eps)
    wide = z_up.to(statistics_dtype(z_up.dtype))
    return swiglu(gate, (rows_of(alpha_up, order) * wide).to(z_up.dtype)), wide.square().mean(-1)


def check_expert_norm(z: Tensor, alpha: Tensor, order: Order, weights: Tensor | None = None) -> None:
    """Raise ValueError if shapes do not fit."""
    _check_rows(z, alpha, order)
    if weights is not None and weights.shape != z.shape[:1]:
        raise ValueError(f"weights have shape {list(weights.shape)}, expected {list(z.shape[:1])}")


def check_expert_swiglu(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    order: Order,
    joint: bool = False,
    eps: float = 0.0,
    up_eps: float | None = None,
) -> None:
    """Raise ValueError if shapes do not fit, or a joint group lacks an alpha or has two eps."""
    for alpha in (alpha_gate, alpha_up):
        _check_rows(z_gate, alpha, order)
    gate, up = (None if alpha is None else alpha[0] for alpha in (alpha_gate, alpha_up))
    check_swiglu(z_gate, z_up, gate, up, joint, eps, up_eps)


def _check_rows(z: Tensor, alpha: Tensor | None, order: Order) -> None:
    if alpha is not None and alpha.shape != (expected := (len(order.ends_E), z.shape[-1])):
        raise ValueError(f"alpha has shape {list(alpha.shape)}, expected {list(expected)}")
    if z.shape[:-1] != order.experts_M.shape:
        raise ValueError(f"{len(z)} rows were given in an order of {len(order.experts_M)}")


class _RowsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(experts, ends)
        return alpha.index_select(0, experts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum_by_expert(gradients[0], *ctx.saved_tensors), None, None


class _ExpertScaledNorm(torch.autograd.Function):
    """It saves z, and r with one number for each row."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, alpha: Tensor, weights: Tensor | None, experts: Tensor, ends: Tensor, eps: Eps
    ) -> Tensor:
        wide = z.to(statistics_dtype(z.dtype))
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(z.shape[1])
        r = square.add_(eps.unsqueeze(-1) if isinstance(eps, Tensor) else eps).rsqrt_()
        ctx.save_for_backward(z, alpha, weights, experts, ends, r)
        # neither in place nor by a cast that does nothing: torch.compile of torch 2.11 then gives wrong gradients
        y = wide * r * alpha.index_select(0, experts)
        y = y if weights is None else y * weights.unsqueeze(1)
        return y if y.dtype == z.dtype else y.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, alpha, weights, experts, ends, r = ctx.saved_tensors
        n = z.to(r.dtype) * r
        w = None if weights is None else weights.unsqueeze(1)
        product = gradients[0] * n
        if w is not None:
            product.mul_(w)
        dalpha = _sum_by_expert(product.to(alpha.dtype), experts, ends)
        scaled = gradients[0] * alpha.index_select(0, experts)
        mean = torch.linalg.vecdot(scaled.to(n.dtype), n).div_(z.shape[1]).unsqueeze(-1)
        dz = scaled.to(r.dtype).addcmul(n, mean, value=-1).mul_(r)
        if w is not None:
            dz.mul_(w)
        dw, deps = (mean * z.shape[1]).squeeze(-1), None
        if ctx.needs_input_grad[5]:
            deps = (dw if weights is None else dw * weights) * r.squeeze(-1).square() / -2
        return dz.to(z.dtype), dalpha, None if weights is None else dw.to(weights.dtype), None, None, deps


class _Permute(torch.autograd.Function):
    """A gather whose derivative writes every number once, where that of index_select adds to zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return torch.empty_like(gradients[0]).scatter_(0, places, gradients[0]), None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Tensor, tokens: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(pairs, tokens)
        ctx.top_k = top_k
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs, tokens = ctx.saved_tensors
        return _sum_by_token(gradients[0], pairs, tokens, ctx.top_k), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, pairs: Tensor, tokens: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(tokens)
        return _sum_by_token(y, pairs, tokens, top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        return gradients[0].index_select(0, tokens), None, None, None


def _sum_by_token(rows: Tensor, pairs: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """The derivative of a gather, with the same order of summation on every device."""
    n_tokens = len(pairs) // top_k
    if _adds_in_order(rows):
        return rows.new_zeros(n_tokens, rows.shape[1]).index_add_(0, tokens, rows)
    places = torch.empty_like(pairs).scatter_(0, pairs, torch.arange(len(pairs), device=pairs.device))
    return rows[places.view(n_tokens, top_k)].sum(1)


def _sum_by_expert(rows_MO: Tensor, experts_M: Tensor, ends_E: Tensor) -> Tensor:
    """The sum of each expert's rows, `[E, O]`, with the same order of summation on every device."""
    return (_sums_op if _has_no_numbers(rows_MO) else _sums)(rows_MO, experts_M, ends_E)


def _sums(rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    if _adds_in_order(rows):
        return rows.new_zeros(len(ends), rows.shape[1]).index_add_(0, experts, rows)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return torch.segment_reduce(rows, "sum", lengths=counts, unsafe=True)  # the safe one reads counts on the host


def _adds_in_order(rows: Tensor) -> bool:
    """Whether `index_add_` adds one row after the other: on a CPU, where torch.compile does not make it atomic."""
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _rows_product(x, weight.transpose(1, 2), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, ends = ctx.saved_tensors
        dy = gradients[0].contiguous()  # no kernel takes the strides of a broadcast gradient
        dx = _rows_product(dy, weight, ends) if ctx.needs_input_grad[0] else None
        return dx, _groups_product(dy, x, ends) if ctx.needs_input_grad[1] else None, None


def _rows_product(x_MI: Tensor, matrices_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """`x A_e` for each row."""
    if _takes_grouped_mm(x_MI, matrices_EIO.shape[2]):
        return F.grouped_mm(x_MI, matrices_EIO, offs=ends_E)
    return (_rows_op if _has_no_numbers(x_MI) else _rows)(x_MI, matrices_EIO, ends_E)


def _groups_product(y_MO: Tensor, x_MI: Tensor, ends_E: Tensor) -> Tensor:
    """`y_e^T x_e` for each expert's rows; zero for an expert without rows."""
    if not _takes_grouped_mm(x_MI, y_MO.shape[1]):
        return (_groups_op if _has_no_numbers(x_MI) else _groups)(y_MO, x_MI, ends_E)
    product = F.grouped_mm(y_MO.t(), x_MI, offs=ends_E)
    if product.device.type == "cuda":  # some kernels do not write it (pytorch/pytorch#172439, #174314)
        empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        product = product.masked_fill(empty_E[:, None, None], 0.0)
    return product


def _takes_grouped_mm(x: Tensor, width: int) -> bool:
    """Whether torch's kernel takes rows as wide as those of x and `width`: rows of whole 16 bytes, not float64.

    Its compiled form and its form for fake tensors take bfloat16 on a GPU only.
    """
    if _has_no_numbers(x) and (x.device.type != "cuda" or x.dtype != torch.bfloat16):
        return False
    aligned = x.shape[1] * x.itemsize % 16 == 0 and width * x.itemsize % 16 == 0
    return aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _has_no_numbers(x: Tensor) -> bool:
    """Whether the numbers of x cannot be read: under torch.compile, on fake (`sdd plan`) and on meta tensors."""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)


def _rows(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for rows, matrix in zip(_slices(ends), matrices, strict=True):
        torch.mm(x[rows], matrix, out=out[rows])
    return out


def _groups(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(len(ends), y.shape[1], x.shape[1])
    for rows, product in zip(_slices(ends), out, strict=True):
        torch.mm(y[rows].t(), x[rows], out=product)
    return out


def _slices(ends: Tensor) -> Iterator[slice]:
    """Yield each expert's rows. Waits for the device."""
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


# torch.compile cannot trace a loop whose length depends on the data, but it can call an operation whose shapes it knows
_rows_op = torch.library.custom_op("sdd::expert_rows", _rows, mutates_args=())
_groups_op = torch.library.custom_op("sdd::expert_groups", _groups, mutates_args=())
# which torch.compile would make atomic additions
_sums_op = torch.library.custom_op("sdd::expert_sums", _sums, mutates_args=())


@_rows_op.register_fake
def _(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[2])


@_groups_op.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), y.shape[1], x.shape[1])


@_sums_op.register_fake
def _(rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(ends), rows.shape[1])
