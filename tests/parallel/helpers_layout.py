"""Layouts as text, and small models."""

from hypothesis import strategies as st

from sdd.models import ModelConfig


def options_of(words):
    """The sizes that options name: `--parallel.tensor 2 --parallel.shard 4`."""
    parts = words.removeprefix("--parallel.").split(" --parallel.")
    return {name: int(size) for name, size in (part.split() for part in parts)}


def _model(heads, share, head_dim, d_ff, context):
    return ModelConfig(1, heads * share * head_dim, d_ff, heads * share, heads, 64, context)


#: Shapes of models, with key-value heads, query heads and a hidden width that few sizes divide.
models = st.builds(
    _model,
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([2, 4]),
    st.integers(1, 48),
    st.sampled_from([8, 12, 30, 31]),
)
