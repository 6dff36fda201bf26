"""Attention within documents: the mask, its blocks, and flex attention in the place of SDPA with the mask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import pytest
import torch
from helpers_models import drawn_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import sdd
from sdd import kernels
from sdd.models import LanguageModel, MoEConfig, documents, transformer
from sdd.models.documents import BLOCK, block_mask, dense_mask, flex_attends
from sdd.models.documents import documents as documents_of
from sdd.models.lean import LeanBlock
from sdd.placement import placements

EOS = 3
LENGTH = 2 * BLOCK + 44


def drawn_documents(length: int, ends: float, seed: int, rows: int = 2) -> Tensor:
    """Documents of `1 / ends` tokens on average."""
    closes = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < ends
    return documents_of(closes.long(), eos=1)


lengths_and_ends = given(
    st.one_of(st.integers(1, 5 * BLOCK), st.sampled_from([BLOCK, 2 * BLOCK, 2 * BLOCK + 1])),
    st.sampled_from([0, 1e-3, 1e-2, 0.1, 1]),
    st.integers(0, 99),
)


def long_model(placement: str = "sdd", **changes: Any) -> LanguageModel:
    shape: dict[str, Any] = {"d_model": 64, "n_layers": 2, "context": LENGTH}
    return tiny_model(placement, **shape | changes)


@contextmanager
def blocks_on_cpu(compiled: Callable[..., Tensor] = flex_attention) -> Iterator[None]:
    """Models attend as on a GPU, by flex attention. Torch refuses its backward pass on a CPU, but its reference can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_validate_device", lambda *_: None)
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(documents, "_compiled", lambda: compiled)
        patch.setattr(transformer, "attention_mask", lambda tokens, eos, *_: block_mask(documents_of(tokens, eos)))
        yield


def loss_and_gradients(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    loss = model(tokens, tokens.roll(-1, 1), document_eos=EOS)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


# --- the mask ---


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_a_document_runs_from_after_an_eos_to_the_next(row: list[int]):
    eos = 0
    document = [row[:t].count(eos) for t in range(len(row))]
    expected = [[s <= t and document[s] == document[t] for s in range(len(row))] for t in range(len(row))]
    assert dense_mask(documents_of(torch.tensor([row]), eos)).tolist() == [[expected]]


@lengths_and_ends
@settings(max_examples=30)
def test_blocks_are_those_that_torch_finds_in_the_mask(length: int, ends: float, seed: int):
    mask = block_mask(drawn_documents(length, ends, seed))
    expected = create_block_mask(mask.mask_mod, 2, None, length, length, device="cpu")
    assert mask.shape == expected.shape
    for side in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            assert torch.equal(getattr(mask, f"{side}_{part}"), getattr(expected, f"{side}_{part}")), (side, part)


@lengths_and_ends
@settings(max_examples=30)
def test_blocks_and_mask_allow_the_same(length: int, ends: float, seed: int):
    document = drawn_documents(length, ends, seed)
    assert torch.equal(documents.as_dense(block_mask(document)), dense_mask(document))


@lengths_and_ends
@settings(max_examples=30)
def test_some_rows_of_the_mask_are_its_rows(length: int, ends: float, seed: int):
    document = drawn_documents(length, ends, seed)
    some = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.4
    some[seed % length] = True
    rows = some.nonzero().squeeze(1)
    mask, whole = block_mask(document, rows), dense_mask(document)
    assert torch.equal(dense_mask(document, rows), whole[:, :, rows])
    assert torch.equal(documents.as_dense(mask), whole[:, :, rows])
    # blocks that torch finds are among ours, and all of a full block is allowed
    expected = create_block_mask(mask.mask_mod, 2, None, len(rows), length, device="cpu")
    listed, full = (_listed(mask, side) for side in ("kv", "full_kv"))
    wanted, wanted_full = (_listed(expected, side) for side in ("kv", "full_kv"))
    assert not (wanted | wanted_full)[~(listed | full)].any()
    assert not full[~wanted_full].any()


def _listed(mask: BlockMask, side: str) -> Tensor:
    """Which blocks one of a mask's two lists names, bool `[B, M, N]`."""
    count, columns = (getattr(mask, f"{side}_{part}")[:, 0] for part in ("num_blocks", "indices"))
    named = torch.arange(columns.shape[-1]) < count[..., None]
    return torch.zeros_like(named).scatter(-1, columns.long(), named)


@given(st.integers(2, 4), st.integers(1, 3), st.sampled_from([0, 1e-3, 1e-2]), st.integers(0, 99))
@settings(max_examples=30)
def test_blocks_of_two_pieces_are_those_that_torch_finds(size: int, blocks: int, ends: float, seed: int):
    document = drawn_documents(2 * size * blocks * BLOCK, ends, seed)
    pieces = torch.arange(document.shape[1]).chunk(2 * size)
    mask = block_mask(document, torch.cat([pieces[seed % size], pieces[-1 - seed % size]]))
    expected = create_block_mask(mask.mask_mod, 2, None, *mask.shape[-2:], device="cpu")
    assert mask.shape == expected.shape
    for side in ("kv", "full_kv"):
        assert torch.equal(_listed(mask, side), _listed(expected, side)), side


def test_blocks_skip_other_documents():
    row = torch.arange(64 * BLOCK) // BLOCK
    mask = block_mask(row[None])
    assert mask.sparsity() == 100 * (1 - 1 / 64)


def test_a_cpu_has_the_mask():
    tokens = drawn_tokens(long_model().config)
    assert isinstance(documents.attention_mask(tokens, EOS, 16, torch.float32), Tensor)


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype"), [(BLOCK, 64, torch.float32), (4096, 8, torch.float32), (4096, 64, torch.float64)]
)
def test_flex_attention_leaves_what_its_kernels_do_not_take(length: int, head_dim: int, dtype: torch.dtype):
    assert not flex_attends(length, head_dim, dtype)


# --- attention ---


@given(
    st.integers(BLOCK + 1, 3 * BLOCK), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]),
    st.sampled_from([16, 24, 64]), st.sampled_from([0, 1e-2, 0.1]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15)
def test_flex_attention_is_attention_with_the_mask(length: int, K: int, group: int, D: int, ends: float, seed: int):
    torch.manual_seed(seed)
    document = drawn_documents(length, ends, seed)
    q, k, v = (torch.randn(2, heads, length, D).double().requires_grad_() for heads in (K * group, K, K))
    with blocks_on_cpu():
        y = documents.attend_in_blocks(q, k, v, block_mask(document))
        expected = scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(document), enable_gqa=group > 1)
        gradient = torch.randn_like(y)
        gradients, wanted = (torch.autograd.grad(out, (q, k, v), gradient) for out in (y, expected))
    torch.testing.assert_close((y, *gradients), (expected, *wanted))


# --- models ---


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", placements)
def test_a_model_computes_the_same_with_either_mask(name: str, checkpointed: bool):
    model = long_model(name, dtype=torch.float64)
    model.checkpoint_blocks = checkpointed
    tokens = drawn_tokens(model.config)
    expected = loss_and_gradients(model, tokens)
    with blocks_on_cpu():
        torch.testing.assert_close(loss_and_gradients(model, tokens), expected)


@pytest.mark.parametrize("name", ["sdd", "sdd-released", "prenorm-qk"])
def test_lean_blocks_attend_by_either_mask(name: str):
    model = long_model(name, dtype=torch.float64)
    for block in model.blocks:
        cast(LeanBlock, block).force_lean = True
    tokens = drawn_tokens(model.config)
    expected = loss_and_gradients(model, tokens)
    with blocks_on_cpu():
        torch.testing.assert_close(loss_and_gradients(model, tokens), expected)


def test_experts_see_the_same_tokens_with_either_mask():
    moe = MoEConfig(n_experts=4, top_k=2)
    model = long_model("sdd", dtype=torch.float64, moe=moe)
    tokens = drawn_tokens(model.config)
    expected = loss_and_gradients(model, tokens)
    with blocks_on_cpu():
        torch.testing.assert_close(loss_and_gradients(model, tokens), expected)


def test_flex_attention_takes_what_autocast_gives():
    model = long_model()
    tokens = drawn_tokens(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model, tokens)
        with blocks_on_cpu():
            found = loss_and_gradients(model, tokens)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=1e-2)


def test_a_probe_records_the_same_with_either_mask():
    rows = []
    for attends in (nullcontext, blocks_on_cpu):
        model = long_model(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens = drawn_tokens(model.config)
        with sdd.Probe(model, optimizer, every=1) as probe, attends():
            model(tokens, tokens.roll(-1, 1), document_eos=EOS).backward()
            optimizer.step()
        rows.append(probe.latest)
    for name, stats in rows[0]["sites"].items():
        assert rows[1]["sites"][name] == pytest.approx(stats, rel=1e-5), name
    assert "entropy" in rows[0]["sites"]["blocks.0.attn"]


# --- compiled ---

compiles = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")


@pytest.mark.ties
@compiles
@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "blocks", "model"])
def test_new_documents_compile_nothing_anew(part: str):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, plain = (long_model(dtype=torch.float64) for _ in range(2))
    model.checkpoint_blocks = True
    for module in {"attention": [], "blocks": model.blocks, "model": [model]}[part]:
        module.compile(backend=counter)
    counts = []
    for seed in range(3):
        tokens = drawn_tokens(model.config, seed=seed)
        expected = loss_and_gradients(plain, tokens)
        with blocks_on_cpu(torch.compile(flex_attention, backend=counter)):
            torch.testing.assert_close(loss_and_gradients(model, tokens), expected)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[2] == counts[0]


@compiles
def test_a_probed_step_attends_by_the_compiled_kernel():
    """A probe runs the model eagerly. Eager flex attention would hold the context x context weights of all heads."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = long_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sdd.Probe(model, optimizer, every=1), blocks_on_cpu(torch.compile(flex_attention, backend=counter)):
        model(drawn_tokens(model.config), document_eos=EOS)
    assert counter.frame_count > 0


@compiles
@pytest.mark.slow
def test_the_kernel_of_a_cpu_skips_the_right_blocks():
    """Inductor's kernel reads the blocks, which torch's reference does not; it has no backward pass on a CPU."""
    model = long_model()
    tokens = drawn_tokens(model.config)
    with torch.no_grad():
        expected = model(tokens, document_eos=EOS)
        with blocks_on_cpu(torch.compile(flex_attention)):
            torch.testing.assert_close(model(tokens, document_eos=EOS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@compiles
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_a_gpu_computes_the_same_with_either_mask(bfloat16: bool, checkpointed: bool, compiled: bool):
    torch._dynamo.reset()
    model, plain = (long_model("sdd-released", context=1100).cuda() for _ in range(2))
    model.checkpoint_blocks = checkpointed
    if compiled:
        model.compile()
    for seed in range(2):
        tokens = drawn_tokens(model.config, seed=seed).cuda()
        assert isinstance(documents.attention_mask(tokens, EOS, 16, torch.float32), BlockMask)
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            found = loss_and_gradients(model, tokens)
            with kernels.use("composed"):
                assert isinstance(documents.attention_mask(tokens, EOS, 16, torch.float32), Tensor)
                expected = loss_and_gradients(plain, tokens)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-2 if bfloat16 else 1e-4, atol=0)
        for got, wanted in zip(found[1:], expected[1:], strict=True):
            distance = torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted)
            assert distance < (0.05 if bfloat16 else 1e-3)
