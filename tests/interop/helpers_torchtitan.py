"""torchtitan's debug model, small, on a CPU."""

import warnings
from dataclasses import replace

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of torch, where torchtitan imports it
    from torchtitan.models import llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    from sdd.interop.torchtitan import SDDConverter, model_registry

from sdd.placement import Norm, Placement

T = 32


def small(placement, n_layers=2, converters=()):
    """A spec with few blocks, plain causal attention and a short RoPE table."""
    config = llama3.llama3_configs["debugmodel"](attn_backend="flex")
    del config.layers[n_layers:]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        layer.attention.rope = replace(layer.attention.rope, max_seq_len=T)
    for converter in (SDDConverter.Config(placement=placement), *converters):
        config = converter.build().convert(config)
    return replace(model_registry("debugmodel"), model=config)


def built(config, seed=0):
    """The model, with other scales of norms than the initial ones."""
    torch.manual_seed(seed)
    model = config.build()
    model.init_states()
    shake(model)
    return model


@torch.no_grad()
def shake(model):
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))


def tokens(rows=2):
    return torch.randint(2048, (rows, T), generator=torch.Generator().manual_seed(3))


def drawn_placement(draw, st):
    """A placement with any norm at any site."""
    scale = st.fixed_dictionaries({"alpha_factor": st.sampled_from([0.5, 1.0]), "eps": st.sampled_from([1e-6, 1e-5])})
    norms = {}
    for site in ("embed", "attn_in", "q", "k", "v", "ctx", "attn_out", "attn_post", "ffn_in"):
        if draw(st.booleans()):
            heads = {} if site not in ("q", "k", "v", "ctx") or draw(st.booleans()) else {"group": "head"}
            shared = {"shared_alpha": draw(st.booleans())} if heads else {}
            norms[site] = Norm(**draw(scale), **heads, **shared)
    for site in ("gate", "up", "ffn_out", "ffn_post", "final"):
        if draw(st.booleans()):
            norms[site] = Norm(scale=False) if draw(st.booleans()) else Norm(**draw(scale))
    rule = draw(st.sampled_from(["x + f", "(2L)^(1/4) x + f", "sqrt(k/(k+1)) x + f/sqrt(k+1)"]))
    changed = {0: {"attn_in": None}, -1: {"ffn_in": Norm()}} if draw(st.booleans()) else {}
    return Placement(norms, residual=rule, init=draw(st.sampled_from(["base", "deepnorm"])), overrides=changed)
