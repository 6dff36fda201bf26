"""What an exchange costs on given links, by the formulas of rings.

Of a tensor of S bytes and a group of n GPUs, each GPU sends

    all-gather, reduce-scatter     S (n - 1)/n      in n - 1 steps
    all-reduce                     2 S (n - 1)/n    in 2 (n - 1) steps
    all-to-all                     S (n - 1)/n      in n - 1 steps, to each of the others as much
    broadcast                      S                in n - 1 steps

A ring passes through one node after the other: of n hops, as many leave a node as there are borders. All links of a
node work at once, so that each GPU's own network adapter carries its share. The groups of a layout differ in where they
lie; the one with the most borders counts, as the others wait for it. A call takes

    max(bytes inside / link, bytes between / network) + latency of each step

The latencies are those that NCCL's own model has for rings (src/graph/tuning.cc, protocol LL128).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from sdd.parallel.layout import DIMENSIONS, ParallelConfig
from sdd.plan.traffic import ALL_REDUCE, ALL_TO_ALL, BROADCAST, Stream, Traffic, Volume

#: Seconds of a step of a ring inside a node and between nodes.
STEP_INSIDE, STEP_BETWEEN = 1.9e-6, 4.0e-6


@dataclass(frozen=True)
class Cluster:
    """Nodes of equally many GPUs, and their links.

    Attributes:
        gpus_per_node: GPUs of a node.
        link: GB/s that a GPU sends inside its node, in one direction.
        network: GB/s that a GPU sends to other nodes, in one direction.
    """

    gpus_per_node: int
    link: float
    network: float


class Exchange(NamedTuple):
    """What one GPU sends through a stream, and how long that takes.

    Attributes:
        kind: of the operation.
        dims: dimensions of the mesh that the group spans.
        processes: of the group.
        prefetched: whether the model computes meanwhile.
        calls: number of operations.
        inside, between: bytes that a GPU sends inside its node and to other nodes.
        seconds: of all calls.
    """

    kind: str
    dims: str
    processes: int
    prefetched: bool
    calls: int
    inside: float
    between: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return self._asdict()


def exchanges(traffic: Traffic, layout: ParallelConfig, cluster: Cluster) -> list[Exchange]:
    """What each stream costs, the longest first."""
    found = [_exchange(stream, volume, layout, cluster) for stream, volume in traffic.items()]
    return sorted(found, key=lambda exchange: -exchange.seconds)


def _exchange(stream: Stream, volume: Volume, layout: ParallelConfig, cluster: Cluster) -> Exchange:
    n, kind = len(stream.ranks), stream.kind
    dims = spanned(stream.ranks, layout)
    share, nodes = _worst(dims, layout, cluster.gpus_per_node, kind == ALL_TO_ALL)
    sent = volume.size * {ALL_REDUCE: 2 * (n - 1) / n, BROADCAST: 1}.get(kind, (n - 1) / n)
    inside, between = sent * (1 - share), sent * share
    rounds = 2 if kind == ALL_REDUCE else 1
    latency = rounds * ((n - nodes) * STEP_INSIDE + (nodes - 1) * STEP_BETWEEN)
    seconds = max(inside / (cluster.link * 1e9), between / (cluster.network * 1e9)) + volume.calls * latency
    return Exchange(kind, " x ".join(dims), n, stream.prefetched, volume.calls, inside, between, seconds)


def spanned(ranks: tuple[int, ...], layout: ParallelConfig) -> tuple[str, ...]:
    """The dimensions of the mesh along which the processes of a group differ."""
    sizes = [getattr(layout, name) for name in DIMENSIONS]
    places = torch.stack(torch.unravel_index(torch.tensor(ranks), sizes))
    return tuple(name for name, place in zip(DIMENSIONS, places, strict=True) if len(place.unique()) > 1)


@cache
def _worst(dims: tuple[str, ...], layout: ParallelConfig, per_node: int, to_all: bool) -> tuple[float, int]:
    """The largest share of what a group sends that leaves a node, and the most nodes that a group lies on."""
    found = [_borders(nodes, to_all) for nodes in _nodes(dims, layout, per_node)]
    return max(share for share, _ in found), max(count for _, count in found)


def _nodes(dims: tuple[str, ...], layout: ParallelConfig, per_node: int) -> Iterator[list[int]]:
    """Yield the nodes of the processes of each group, in the order of their ranks."""
    sizes = layout.sizes
    ranks = torch.arange(torch.Size(sizes[name] for name in DIMENSIONS).numel())
    mesh = ranks.view([sizes[name] for name in DIMENSIONS])
    others = [axis for axis, name in enumerate(DIMENSIONS) if name not in dims]
    within = [axis for axis, name in enumerate(DIMENSIONS) if name in dims]
    size = torch.Size(sizes[name] for name in dims).numel()
    yield from (mesh.permute(*others, *within).reshape(-1, size) // per_node).tolist()


def _borders(nodes: list[int], to_all: bool) -> tuple[float, int]:
    n = len(nodes)
    if to_all:
        away = max(n - nodes.count(node) for node in set(nodes))
        return away / (n - 1), len(set(nodes))
    return sum(a != b for a, b in zip(nodes, [*nodes[1:], nodes[0]], strict=True)) / n, len(set(nodes))
