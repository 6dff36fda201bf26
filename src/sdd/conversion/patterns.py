"""Glob patterns of dotted names."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase


def as_patterns(patterns: str | Sequence[str], argument: str) -> tuple[str, ...]:
    """One glob pattern or several as a tuple.

    Raises:
        ValueError: if they are no text; `argument` is the name of what was given.
    """
    if isinstance(patterns, str):
        return (patterns,)
    found = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f"{argument}={patterns!r}: give a glob pattern, as 'q_proj', or a list of them")
    return tuple(found)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a glob pattern fits the whole dotted name or its ending after a dot; `*` crosses dots."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def check_patterns(argument: str, patterns: Iterable[str], layers: Sequence[str], others: Mapping[str, str]) -> None:
    """Raise ValueError for a pattern that fits no layer, with the nearest names.

    Args:
        argument: whose patterns they are.
        patterns: glob patterns.
        layers: the names that they may fit.
        others: the kind of what else has a name, by name.
    """
    endings = sorted({name.rpartition(".")[2] for name in layers})
    for pattern in patterns:
        if any(matches(name, [pattern]) for name in layers):
            continue
        fitted = [f"{name} (a {kind})" for name, kind in others.items() if matches(name, [pattern])]
        near = get_close_matches(pattern, [*endings, *layers], n=5, cutoff=0.4)
        hint = f"it fits {fitted[0]}" if fitted else f"nearest: {', '.join(near or endings)}"
        raise ValueError(
            f"{argument}={pattern!r} fits no nn.Linear of this model ({hint}); give glob patterns of dotted names or "
            "of their endings, as in 'q_proj' or '*.layers.0.*'"
        )
