"""torch's ring attention in the place of gathered keys and values, and where it is refused."""

import re
from dataclasses import replace

import pytest
import torch
from helpers_processes import in_processes
from helpers_ring import on_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn.functional import scaled_dot_product_attention

from sdd.errors import UserError
from sdd.models import LanguageModel, ModelConfig, model_presets
from sdd.models.token_split import ALL_TOKENS
from sdd.parallel import ParallelConfig, share_sequences
from sdd.parallel import ring as ring_module
from sdd.parallel.context import ContextSplit
from sdd.parallel.ring import RingAttention, check_ring
from sdd.train import DataConfig, RunConfig, config_io

NANO = model_presets["nano"]
RING = ParallelConfig(context=2, context_attention="ring")
CUDA = torch.device("cuda")


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(rank, size):
    """Of drawn shapes: errors of this process's tokens and gradients, relative to attention of the whole."""
    calls = on_cpu()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("context",))
    split, found = ContextSplit(mesh, ALL_TOKENS, RingAttention(mesh)), []
    for seed in range(4):
        heads, group, T = 1 + seed % 2, 1 + seed % 3, 2 * size * (1 + seed)
        split.begin(T, cached=False)
        q, k, v, g = (
            drawn(2, n, T, 8, seed=seed + i) for i, n in enumerate((heads * group, heads, heads, heads * group))
        )
        at = split.positions(T, q.device)
        own = [x[:, :, at].clone().requires_grad_() for x in (q, k, v)]
        y = split.attend(*own)
        y.backward(g[:, :, at])
        whole = [x.requires_grad_() for x in (q, k, v)]
        y_whole = scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
        y_whole.backward(g)
        pairs = [(y, y_whole), *((a.grad, b.grad) for a, b in zip(own, whole, strict=True))]
        found += [((a - b[:, :, at]).norm() / b.norm()).item() for a, b in pairs]
    assert calls == [(("context",), [(Shard(2),)] * 3, True)] * 4, "torch's ring was called each time"
    return found


@pytest.mark.parametrize("group", [1, 3])
def test_one_process_attends_to_its_own_tokens(group):
    q, k, v = (drawn(2, n, 5, 8, seed=n + i).double() for i, n in enumerate((2 * group, 2, 2)))
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    weights = (q @ keys.mT / 8**0.5).masked_fill(later, -torch.inf).softmax(-1)
    torch.testing.assert_close(ALL_TOKENS.attend(q, k, v), weights @ values)


@pytest.mark.parametrize("size", [2, 4])
def test_the_ring_of_pieces_is_attention_of_the_whole(size):
    for errors in in_processes(size, attended, size):
        assert max(errors) < 2e-6


def not_spread(rank):
    """Tokens that do not divide are not sent around, and documents are refused."""
    calls = on_cpu()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("context",))
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(1, 32, 48, 4, 2, 64, 32))
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = model(tokens)
        share_sequences(model, mesh, ring=True)
        same = torch.equal(model(tokens), expected)
        with pytest.raises(ValueError, match="document_eos needs a mask, and ring attention has none"):
            model(tokens[:, :8], document_eos=5)
    return same, calls


def test_what_all_processes_have_goes_round_no_ring_and_documents_are_refused():
    assert in_processes(2, not_spread) == [(True, [])] * 2


# --- refusals


@pytest.mark.parametrize(
    ("model", "device", "dtype", "line"),
    [
        (NANO, "cpu", torch.bfloat16, "runs on CUDA GPUs alone, and this run is on cpu: choose gather"),
        (NANO, "cuda", None, "runs flash attention, which has no float32: choose gather, or precision=bfloat16"),
        (replace(NANO, d_model=1040), "cuda", torch.bfloat16, "takes heads of at most 256 features, not 260: choose"),
    ],
)
def test_what_the_ring_cannot_do_is_refused_in_a_line(model, device, dtype, line):
    with pytest.raises(UserError, match=re.escape(f"parallel.context_attention=ring {line}")) as error:
        check_ring(RING, model, torch.device(device), dtype)
    assert "\n" not in str(error.value)


def test_a_torch_without_a_ring_is_refused(monkeypatch):
    check_ring(RING, NANO, CUDA, torch.bfloat16)
    monkeypatch.setattr(ring_module, "_NAMES", ("_moved",))
    with pytest.raises(UserError, match=r"torch .* has no ring attention that is known here .*: choose gather$"):
        check_ring(RING, NANO, CUDA, torch.bfloat16)


@pytest.mark.parametrize("place", ring_module._PLACES)
def test_the_ring_is_found_in_each_place(monkeypatch, place):
    monkeypatch.setattr(ring_module, "_PLACES", ("nowhere", place))
    check_ring(RING, NANO, CUDA, torch.bfloat16)


@pytest.mark.parametrize("layout", [ParallelConfig(context=2), replace(RING, context=1)])
def test_where_nothing_goes_round_nothing_is_checked(layout):
    check_ring(layout, NANO, torch.device("cpu"), None)
    RunConfig(NANO, DataConfig(document_mask=True), parallel=layout)


def test_documents_are_refused_before_anything_is_read():
    config = config_io.to_dict(RunConfig(NANO, DataConfig(document_mask=True), parallel=ParallelConfig(context=2)))
    config["parallel"]["context_attention"] = "ring"
    with pytest.raises(UserError, match=r"context_attention=ring has no document mask: choose gather, or leave out"):
        config_io.from_dict(config)


def test_a_layout_says_that_it_is_a_ring():
    assert str(replace(RING, tensor=2)) == "context 2, tensor 2 by ring attention"
    assert str(replace(RING, context=1)) == "shard 1"
    with pytest.raises(ValueError, match="context_attention='star': choose gather or ring"):
        replace(RING, context_attention="star")
