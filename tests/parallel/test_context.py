"""Sequences that processes share: pieces, keys and values, masks, and what is not shared."""

import pytest
import torch
from helpers_processes import in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention

from sdd.models import LanguageModel, ModelConfig
from sdd.models.documents import dense_mask, documents
from sdd.models.token_split import ALL_TOKENS
from sdd.parallel.context import ContextSplit, share_sequences
from sdd.parallel.exchange import summed
from sdd.placement import placements

CONFIG = ModelConfig(2, 32, 48, 4, 2, 64, 32, placement=placements["sdd"])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attended(rank, size):
    """Of drawn shapes: whether attention and its gradients, of the pieces of all processes, are those of the whole."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("context",))
    split, found = ContextSplit(mesh, ALL_TOKENS), []
    for seed in range(6):
        heads, group, T = 1 + seed % 2, 1 + seed % 3, 2 * size * (1 + seed)
        split.begin(T, cached=False)
        all_heads = (heads * group, heads, heads, heads * group)
        q, k, v, g = (drawn(2, each, T, 4, seed=seed + i) for i, each in enumerate(all_heads))
        document = documents((drawn(2, T, seed=seed) > 1).long(), eos=1)
        at = split.positions(T, q.device)
        # process i has the pieces i and 2P-1-i
        expected = torch.arange(T).view(2 * size, -1)[[rank, 2 * size - 1 - rank]].flatten()
        own = [x[:, :, at].clone().requires_grad_() for x in (q, k, v)]
        y = scaled_dot_product_attention(
            own[0], *split.attended(*own[1:]), attn_mask=dense_mask(document, at), enable_gqa=True
        )
        y.backward(g[:, :, at])
        whole = [x.requires_grad_() for x in (q, k, v)]
        y_whole = scaled_dot_product_attention(*whole, attn_mask=dense_mask(document), enable_gqa=True)
        y_whole.backward(g)
        pairs = [(y, y_whole)] + [(a.grad, b.grad) for a, b in zip(own, whole, strict=True)]
        same = all(torch.allclose(a, b[:, :, at], rtol=1e-12, atol=1e-13) for a, b in pairs)
        in_order = torch.equal(split.all_queries(own[0]), q) and torch.equal(
            split.joined(at[None]), torch.arange(T)[None]
        )
        found.append((same, torch.equal(at, expected), in_order))
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_attention_of_pieces_is_attention_of_the_whole(size):
    for found in in_processes(size, attended, size):
        assert found == [(True, True, True)] * 6


def not_divided(rank):
    """Logits of a number of tokens that does not divide, and what is said where gradients are asked for."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("context",))
    torch.manual_seed(0)
    model = LanguageModel(CONFIG).double()
    tokens = torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(rank))
    tokens = summed(tokens, mesh) % 64
    with torch.no_grad():
        expected = model(tokens, document_eos=5)
        found = share_sequences(model, mesh)(tokens, document_eos=5)
    with pytest.raises(ValueError, match=r"2 \* 2 processes do not divide 10 tokens"):
        model(tokens)
    return torch.equal(found, expected)


def test_tokens_that_do_not_divide_are_on_all_processes_and_have_no_gradients():
    assert all(in_processes(2, not_divided))
