"""Norm groups of fused projections: which parts a matrix has, so that each is normed apart."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sdd.conversion.kinds import features, is_layer, told
from sdd.conversion.patterns import matches
from sdd.norm_groups import Group, resolve_group

#: What `sdd.convert` takes: "heads" for all queries and keys, or groups by pattern.
GroupChoice = Literal["heads"] | Mapping[str, Group | Literal["heads"]] | None

_QKV = (
    "qkv_proj",
    "query_key_value",
    "wqkv",
    "c_attn",
    "qkv",
    "to_qkv",
    "in_proj",
    "in_proj_qkv",
    "att_proj",
    "qkv_lin",
)
_KV = ("kv_proj", "to_kv", "key_value", "kv", "wkv", "c_attn")
_PAIRS = ("gate_up_proj", "up_gate_proj", "gate_up", "w12", "weights_in", "wi", "in_proj")
_QUERIES = ("q_proj", "query", "q", "wq", "q_lin", "to_q", "query_proj", "linear_q", "q_attn")
_KEYS = ("k_proj", "key", "k", "wk", "k_lin", "to_k", "key_proj", "linear_k")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "d_head", "dim_head", "key_value_proj_dim", "d_kv")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")


@dataclass(frozen=True)
class Fused:
    """The parts of a fused projection.

    Attributes:
        group: the norm groups that keep the parts apart.
        by_head: the same with queries and keys in groups of one head.
        note: what could not be found out.
    """

    group: Group
    by_head: Group
    note: str | None = None


def check_choice(choice: GroupChoice) -> None:
    """Raise ValueError for what is no choice of groups."""
    if choice is not None and choice != "heads" and not isinstance(choice, Mapping):
        raise ValueError(f"group={choice!r}: give 'heads', or a dict of groups by pattern, as {{'qkv_proj': 64}}")


def choose(name: str, layer: nn.Module, parent: nn.Module, choice: GroupChoice) -> tuple[Group, str | None]:
    """The norm groups of a layer, and a note if it looks fused and its parts are not known.

    Args:
        name: dotted name of the layer.
        layer: it.
        parent: the module that holds it.
        choice: what the user asked for.

    Raises:
        ValueError: if the groups asked for do not fit the layer.
    """
    fused = find(name, layer, parent)
    by_pattern = choice if isinstance(choice, Mapping) else {}
    fitting: list[Any] = [value for pattern, value in by_pattern.items() if matches(name, [pattern])]
    if fitting and fitting[0] != "heads":
        return _checked(name, layer, fitting[0]), None
    if not fitting and choice != "heads":
        return fused.group, fused.note
    by_head = fused.by_head
    if fitting and by_head is None:
        raise ValueError(f"group={{...: 'heads'}}: no heads are known of {name}; give the width of a head instead")
    return by_head, fused.note


def find(name: str, layer: nn.Module, parent: nn.Module) -> Fused:
    """The parts of a layer by its name, its size, and what its module says of heads."""
    last = name.rpartition(".")[2].lower()
    n_out, head_dim = features(layer)[1], _head_dim(parent, layer)
    is_pair = last not in _QKV and sum(map(is_layer, parent.children())) == 2  # q is half of q|k|v in some models
    if (last in _PAIRS or is_pair) and _reads_half(parent, layer):
        return _parts([n_out // 2, n_out // 2])
    if last in _KV and any(child.lower() in _QUERIES for child, _ in parent.named_children()):
        return _parts([n_out // 2, n_out // 2], head_dim)
    if (widths := _known_parts(last, parent)) and sum(widths) == n_out:
        return _parts([width for width in widths if width])
    if last == "in_proj" and (widths := _mamba2(parent)) and sum(widths) == n_out:
        # dt sets the decay of the state: it stays a plain part
        parts = [*((width, width) for width in widths[:-1]), (widths[-1], 0)]
        group = tuple(part for part in parts if part[0])
        return Fused(group, group)
    if last == "in_proj_qkvz" and (sizes := _sizes(parent, "head_k_dim", "head_v_dim")) and sizes[0] == sizes[1]:
        return Fused(sizes[0], sizes[0])  # q, k, v and a gate for each head in turn
    if last in _QKV:
        return _qkv(name, layer, parent, head_dim)
    if last in _QUERIES and head_dim and n_out == 2 * _width(parent, head_dim):
        return Fused(head_dim, head_dim)  # a query and its gate for each head in turn
    if last in (*_QUERIES, *_KEYS) and head_dim and n_out % head_dim == 0:
        return Fused(None, head_dim)
    return Fused(None, None)


def _qkv(name: str, layer: nn.Module, parent: nn.Module, head_dim: int) -> Fused:
    n_out = features(layer)[1]
    if head_dim and n_out % head_dim == 0 and _interleaved(name, parent):
        return Fused(head_dim, head_dim)
    queries = _width(parent, head_dim) if head_dim else n_out // 3 if _has_thirds(parent, layer) else 0
    keys, rest = divmod(n_out - queries, 2)
    if queries > 0 and keys > 0 and not rest and (not head_dim or keys % head_dim == 0):
        return _parts([queries, keys, keys], head_dim)
    if head_dim and n_out % head_dim == 0:
        return Fused(head_dim, head_dim)
    if name.endswith("in_proj"):
        return Fused(None, None)
    return Fused(None, None, f"{name} looks like a fused projection of parts that are not known: give them in group")


def _interleaved(name: str, parent: nn.Module) -> bool:
    """Whether the parts of each head stand side by side, or may do so: a group for each head is right either way."""
    if name.endswith("query_key_value") or type(parent).__name__.startswith("CodeGen"):
        return True
    return type(parent).__name__.startswith("GPTBigCode") and not told(parent, "multi_query", False)


def _parts(widths: Sequence[int], head_dim: int = 0) -> Fused:
    """Consecutive parts, each one group; by choice queries and keys, which come first, one group a head."""
    group = tuple((width, width) for width in widths)
    heads = widths[: len(widths) - 1] if head_dim else ()
    by_head = tuple((width, head_dim if i < len(heads) else width) for i, width in enumerate(widths))
    return Fused(group, by_head if head_dim else group)


def _mamba2(parent: Any) -> list[int]:
    """Gate, x, B, C and dt of Mamba 2; nothing for another module."""
    sizes = _sizes(parent, "intermediate_size", "n_groups", "ssm_state_size", "num_heads")
    if not sizes or told(parent, "dt_bias") is None:
        return []
    inner, groups, state, heads = sizes
    return [inner, inner, groups * state, groups * state, heads]


def _known_parts(last: str, parent: Any) -> list[int]:
    """Consecutive parts whose sizes the module tells, for latent attention, Mamba, and linear attention."""
    if last.startswith("kv_a_proj"):
        return _sizes(parent, "kv_lora_rank", "qk_rope_head_dim")
    if last == "x_proj":
        return _sizes(parent, "time_step_rank", "ssm_state_size", "ssm_state_size")
    if last == "in_proj_qkv":
        return _sizes(parent, "key_dim", "key_dim", "value_dim")
    return []


def _sizes(module: Any, *names: str) -> list[int]:
    """What a module tells under these names, all or nothing. A size may be 0, as of rotary embeddings left out."""
    sizes = [told(module, name) for name in names]
    return sizes if all(type(size) is int and size >= 0 for size in sizes) else []


def _reads_half(parent: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer beside this one reads half its outputs, and none reads all of them."""
    read = _read_beside(parent, layer)
    n_out = features(layer)[1]
    return n_out % 2 == 0 and n_out // 2 in read and n_out not in read


def _has_thirds(parent: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer has three times as many outputs as it has inputs, or as a layer beside it reads."""
    n_in, n_out = features(layer)
    return n_out % 3 == 0 and n_out // 3 in {n_in, *_read_beside(parent, layer)}


def _read_beside(parent: nn.Module, layer: nn.Module) -> set[int]:
    return {features(child)[0] for child in parent.children() if is_layer(child) and child is not layer}


def _width(parent: nn.Module, head_dim: int) -> int:
    return head_dim * (_number(parent, _HEADS) or 0)


def _head_dim(parent: nn.Module, layer: nn.Module) -> int:
    """The width of a head, or 0 if the module does not tell."""
    given = _number(parent, _HEAD_DIM)
    heads = _number(parent, _HEADS)
    if given or not heads:
        return given or 0
    n_in = features(layer)[0]
    return n_in // heads if n_in % heads == 0 else 0


def _number(module: Any, names: Sequence[str]) -> int | None:
    """The first of these attributes that a module, or else its config, has as a number."""
    return next(_numbers(module, names), None)


def _numbers(module: Any, names: Sequence[str]) -> Iterator[int]:
    for owner in (module, told(module, "config")):
        for name in names:
            value = told(owner, name)
            if type(value) is int and value > 0:
                yield value


def _checked(name: str, layer: nn.Module, group: Group) -> Group:
    try:
        parts = resolve_group(group, features(layer)[1])
    except (ValueError, TypeError) as error:
        raise ValueError(f"group={group!r} of {name}: {error}") from error
    return group if group is None or isinstance(group, int) else tuple(parts)


def shown(group: Group) -> str:
    """Norm groups as the report prints them: `groups of 64`, or `parts 2048|512|512/64`, groups after the slash."""
    if group is None:
        return ""
    if isinstance(group, int):
        return f"groups of {group}"
    return "parts " + "|".join(
        str(width) if size == width else f"{width} plain" if size == 0 else f"{width}/{size}" for width, size in group
    )
