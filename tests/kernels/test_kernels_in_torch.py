"""The kernels inside what PyTorch does with models: compile, checkpointing, autocast, export, sharding, torch.func."""

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers_kernels import DEVICE
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sdd import RMSNorm, SDDLinear, kernels
from sdd.functional import Group, alpha_size, resolve_group, rope_tables
from sdd.kernels.dispatch import HAS_TRITON

needs_kernels = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


class Block(nn.Module):
    """A block with every fused site: q, k from one projection, SwiGLU, both kinds of residual addition."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.qk, self.v = nn.Linear(width, 2 * width, bias=False), SDDLinear(width, width, group=4)
        self.out, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * width, bias=False)
        shapes = {"q": 4, "k": width, "out": width, "pre": width, "gate": width, "up": width, "post": width}
        self.alpha = nn.ParameterDict({name: nn.Parameter(torch.rand(size) + 0.5) for name, size in shapes.items()})
        cos, sin = rope_tables(16, 4, 20.0)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> Tensor:
        h, alpha = self.norm(x), self.alpha
        z_q, z_k = self.qk(h).chunk(2, -1)
        rope = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        q = kernels.qk_norm_rope(z_q, alpha["q"], *rope, n_heads=2, group=4)
        k = kernels.qk_norm_rope(z_k, alpha["k"], *rope, n_heads=2)
        v = self.v(h).unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True).transpose(1, 2).flatten(2)
        x, h = kernels.residual_prenorm(self.out(y), x, alpha["out"], alpha["pre"])
        h, q_up = kernels.sdd_swiglu_bare_up(*self.gate_up(h).chunk(2, -1), alpha["gate"], alpha["up"])
        eps = 1e-6 * (q_up + 1e-6)
        return kernels.residual_norm(self.down(h), x, alpha["post"], alpha["post"], eps=eps)


def model_and_input() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block().to(DEVICE), torch.randn(2, 3, 8, device=DEVICE)


def numbers(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = run(x)
    y.float().square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [y.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@needs_kernels
def test_kernels_equal_the_composed_model() -> None:
    model, x = model_and_input()
    found = {}
    for path in ("composed", "recompute", "triton"):
        with kernels.use(path):
            found[path] = numbers(model, model, x)
    assert_same(found["triton"], found["composed"], rtol=1e-4, atol=1e-5)
    assert_same(found["recompute"], found["composed"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["composed", "recompute"])
@pytest.mark.parametrize("group", [None, 4, [(8, 4), (4, 0), (4, 4)]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_may_be_changed_in_place(path: kernels.Path, group: Group, bias: bool) -> None:
    """As nn.ReLU(inplace=True) does behind a layer; autograd refuses it for a view that a function returns."""
    layer = SDDLinear(6, 16, bias, group=group)
    x = torch.randn(3, 5, 6, requires_grad=True)
    with kernels.use(path):
        found = torch.autograd.grad(F.relu(layer(x), inplace=True).square().sum(), [x, *layer.parameters()])
        expected = torch.autograd.grad(F.relu(layer(x)).square().sum(), [x, *layer.parameters()])
    assert all(map(torch.equal, found, expected))


@needs_kernels
@pytest.mark.parametrize("path", ["auto", "triton"])
def test_compiles_to_one_graph_with_the_eager_numbers(path: kernels.Path) -> None:
    compare_compiled("aot_eager", path)


@needs_kernels
@pytest.mark.parametrize("path", ["auto", "triton"])
@pytest.mark.parametrize("group", [None, 4, [(8, 4), (4, 0), (4, 4)]], ids=str)
def test_a_layer_that_resolved_its_groups_compiles_to_one_graph(path: kernels.Path, group: Group) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = resolve_group(group, 16)
            self.alpha = nn.Parameter(torch.rand(alpha_size(self.parts, shared=False)))

        def forward(self, z: Tensor) -> Tensor:
            return kernels.scaled_norm(z, self.alpha, group=self.parts)

    layer, z = Layer().to(DEVICE), torch.randn(3, 16, device=DEVICE)
    with kernels.use(path):
        eager = numbers(layer, layer, z)
        compiled = numbers(layer, torch.compile(layer, backend="aot_eager", fullgraph=True), z)
        with torch.no_grad():
            exported = torch.export.export(layer, (z,), strict=True).module()(z)
    assert_same([*compiled, exported], [*eager, eager[0]], rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own import
@pytest.mark.skipif(
    not shutil.which("g++") or " " in torch.__file__, reason="inductor needs g++, and no space in its path"
)
def test_compiles_with_inductor() -> None:
    compare_compiled("inductor", "triton")


def compare_compiled(backend: str, path: kernels.Path) -> None:
    model, x = model_and_input()
    with kernels.use(path):
        eager = numbers(model, model, x)
        compiled = numbers(model, torch.compile(model, backend=backend, fullgraph=True), x)
    assert_same(compiled, eager, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_selective_checkpointing_may_keep_what_kernels_return() -> None:
    """A policy that names the operations runs their forward kernels once, one that does not runs them twice."""
    from sdd.kernels import fused

    kept = {torch.ops.sdd.qk_norm_rope.default, torch.ops.sdd.swiglu.default, torch.ops.sdd.residual_norm.default}
    model, x = model_and_input()
    counts: dict[bool, int] = {}
    with kernels.use("triton"), pytest.MonkeyPatch.context() as patch:
        plain = numbers(model, model, x)
        launched = []
        kernel = fused.swiglu.forward_kernel
        patch.setattr(fused.swiglu, "forward_kernel", _Recorder(kernel, launched))
        for keep in (False, True):
            launched.clear()

            def policy(
                _ctx: object, op: object, *_args: object, keep: bool = keep, **_kwargs: object
            ) -> CheckpointPolicy:
                return CheckpointPolicy.MUST_SAVE if keep and op in kept else CheckpointPolicy.PREFER_RECOMPUTE

            contexts = partial(create_selective_checkpoint_contexts, policy)
            run = partial(checkpoint, model, use_reentrant=False, context_fn=contexts)
            assert_same(numbers(model, run, x), plain, rtol=0, atol=0)
            counts[keep] = len(launched)
    assert counts == {False: 2, True: 1}


class _Recorder:
    """A kernel that notes its launches."""

    def __init__(self, kernel: object, launched: list[object]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.launched.append(grid)
        return self.kernel[grid]  # pyright: ignore[reportIndexIssue]


@needs_kernels
@pytest.mark.parametrize("path", ["recompute", "triton"])
def test_autocast_reaches_the_matrix_products_only(path: kernels.Path) -> None:
    model, x = model_and_input()
    with kernels.use(path), torch.autocast(DEVICE, torch.bfloat16):
        seen: list[torch.dtype] = []
        z = model.out(x)
        for y in kernels.residual_prenorm(z, x, model.alpha["out"], model.alpha["pre"], dtype=torch.bfloat16):
            seen.append(y.dtype)
        found = numbers(model, model, x)
    assert z.dtype == torch.bfloat16
    assert seen == [torch.float32, torch.bfloat16]
    assert found[0].dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    with kernels.use("composed"), torch.autocast(DEVICE, torch.bfloat16):
        expected = numbers(model, model, x)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 0.06 * theirs.norm()  # some ten roundings in a row, cut off by the interpreter


@needs_kernels
def test_exports_the_forward_pass() -> None:
    model, x = model_and_input()
    tokens = torch.export.Dim("tokens", min=2, max=16)
    with kernels.use("triton"), torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({1: tokens},), strict=True)
        longer = torch.randn(2, 7, 8, device=DEVICE)
        torch.testing.assert_close(exported.module()(longer), model(longer))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"sdd.scaled_norm.default", "sdd.swiglu.default", "sdd.residual_norm.default"} <= targets


@needs_kernels
@pytest.mark.slow
def test_shards_with_fsdp2_in_mixed_precision(tmp_path) -> None:
    """One process is a world too: bfloat16 gathers, float32 alphas outside of them, the numbers of autocast."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, x = model_and_input()
    whole = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    with kernels.use("triton"):
        with torch.autocast(DEVICE, torch.bfloat16):
            expected = numbers(model, model, x)
        backend = "nccl" if DEVICE == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/world", rank=0, world_size=1)
        try:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            mesh = torch.distributed.init_device_mesh(DEVICE, (1,))
            fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)
            with torch.autocast(DEVICE, torch.bfloat16):
                found = numbers(model, model, x)
            found = [a.full_tensor() if hasattr(a, "full_tensor") else a for a in found]
        finally:
            torch.distributed.destroy_process_group()
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


def test_torch_func_sees_plain_operations() -> None:
    """vmap of grad over samples, which neither custom operations nor autograd.Functions of ours support."""
    layer = SDDLinear(256, 256, bias=False).to(DEVICE)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(3, 200, 256, device=DEVICE)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        layer.zero_grad()
        layer(x[i]).square().sum().backward()
        torch.testing.assert_close(by_sample["alpha"][i], layer.alpha.grad, rtol=1e-3, atol=1e-3)
