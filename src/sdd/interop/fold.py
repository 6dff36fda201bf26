"""What merges into matrices at inference, so that its modules and their passes over memory are gone.

An SDD projection does not see the scale of what it reads (`sdd.models.elimination` has the conditions), so of a norm
whose readers are all SDD only the weight is left:

    up        into the rows of up_proj         u_j = alpha_j (V_up x)_j
    ctx       into the columns of o_proj       (V_o)_ij alpha_j
    attn_in   into the columns of q, k and v
    ffn_in    into the columns of gate and up

The statistic that a reader's exact eps would need is then gone too. Its eps becomes a mere floor, and the function is
the same up to eps / mean(z^2), which the export measures. Learned scales without a norm merge exactly into the rows of
a plain projection.

Norms with a reader that is no SDD do not merge: each token has its own 1/rms.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from sdd.interop.architecture import own_fields
from sdd.models import ModelConfig
from sdd.models.elimination import left_out_norms
from sdd.placement import Site

#: Keeps a row of zeros at zero; far below any mean square that float32 training leaves.
FLOOR = 1e-20
#: Where the weight of a folded norm goes: projections, whether into their columns, and the sites whose eps falls.
_READERS: dict[Site, tuple[tuple[str, ...], bool, tuple[Site, ...]]] = {
    "up": (("up_proj",), False, ("ffn_out",)),
    "ctx": (("self_attn.o_proj",), True, ("attn_out",)),
    "attn_in": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True, ("q", "k", "v")),
    "ffn_in": (("mlp.gate_proj", "mlp.up_proj"), True, ("gate", "up")),
}
_NORMS: dict[Site, str] = {
    "up": "up_norm",
    "ctx": "self_attn.ctx_norm",
    "attn_in": "attn_in_norm",
    "ffn_in": "ffn_in_norm",
}


def fold(state: dict[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Merge what merges.

    Args:
        state: of an `SDDForCausalLM`; stays as it is.
        config: the model's.

    Returns:
        The folded state, the fields of its `SDDConfig`, and lines that say what was merged and what cannot be.
    """
    state, fields = dict(state), own_fields(config)
    exact = replace(config, eliminate_norms=True)
    blocks: list[dict[str, Any]] = []
    done: dict[str, int] = {}
    for index in range(config.n_layers):
        norms = dict(fields["layer_norms"].get(str(index), _of_blocks(fields["norms"])))
        for site in left_out_norms(exact, index):
            _merge(state, f"model.layers.{index}.", site)
            del norms[site]
            norms |= {reader: {**norms[reader], "eps": FLOOR} for reader in _READERS[site][2] if reader in norms}
            done[site] = done.get(site, 0) + 1
        for site in ("gate", "up"):
            if site in fields["scales"] and site not in norms:
                _merge_scale(state, f"model.layers.{index}.mlp.", site)
                done[f"scale of {site}"] = done.get(f"scale of {site}", 0) + 1
        blocks.append(norms)
    if not done:
        return state, fields, _said(done, fields, config)
    gone = {name.removeprefix("scale of ") for name, count in done.items() if count == config.n_layers and " " in name}
    ends = {site: norm for site, norm in fields["norms"].items() if site in ("embed", "final")}
    fields |= {
        "norms": {**ends, **blocks[-1]},
        "layer_norms": {str(index): norms for index, norms in enumerate(blocks) if norms != blocks[-1]},
        "scales": [site for site in fields["scales"] if site not in gone],
        "sdd": None,  # there is no way back
    }
    return state, fields, _said(done, fields, config)


def _of_blocks(norms: dict[str, Any]) -> dict[str, Any]:
    return {site: norm for site, norm in norms.items() if site not in ("embed", "final")}


def _merge(state: dict[str, Tensor], block: str, site: Site) -> None:
    """Multiply the weights of a site's norms into the matrices, in one block; experts have norms of their own."""
    projections, columns, _ = _READERS[site]
    for name in [name for name in state if name.startswith(block) and name.endswith(f"{_NORMS[site]}.weight")]:
        alpha = state.pop(name)
        place = name.removesuffix(f"{_NORMS[site]}.weight")
        for projection in projections:
            matrix = f"{place}{projection}.weight"
            state[matrix] = state[matrix] * (alpha if columns else alpha[:, None])


def _merge_scale(state: dict[str, Tensor], network: str, site: str) -> None:
    scale = state.pop(f"{network}{site}_scale.weight")
    matrix = f"{network}{site}_proj.weight"
    state[matrix] = state[matrix] * scale[:, None]


def _said(done: dict[str, int], fields: dict[str, Any], config: ModelConfig) -> list[str]:
    merged = [f"{name} ({count} of {config.n_layers} blocks)" for name, count in sorted(done.items())]
    left = sorted({site for norms in (fields["norms"], *fields["layer_norms"].values()) for site in norms})
    lines = [f"folded: {', '.join(merged)}" if merged else "nothing folds: no norm has only SDD readers"]
    if left:
        lines.append(f"kept as norms, since each token has its own scale there: {', '.join(left)}")
    scales = [*fields["scales"], *(["mix"] if fields["residual"] is None else [])]
    if scales:
        lines.append(f"kept as learned scales: {', '.join(scales)}")
    return lines
