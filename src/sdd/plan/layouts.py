"""Plans of layouts: memory, traffic and step time of each, and a search for the fastest.

    compute     the model's FLOPs over the GPUs' peak at the assumed utilisation
    prefetched  what FSDP2 exchanges; it runs beside compute
    waiting     every other exchange; compute waits for it
    step        max(compute, prefetched) + waiting

The optimiser's arithmetic, data loading and checkpoints are not in a step, nor is the contention of links.

The search leaves out, and says so:

    tensor      groups that do not lie within one node
    replicate   copies that are not whole nodes, unless they are single GPUs: within a node, `shard` needs less memory
    rows        layouts whose data dimensions do not divide the batch
    context     sequences shared by several GPUs, where those of the same layout with a smaller `context` fit
    memory      more copies (`replicate`) of what does not fit
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sdd.errors import UserError
from sdd.models.flops import training_flops
from sdd.parallel.layout import ParallelConfig, divisors, layouts
from sdd.plan.cluster import Cluster, Exchange, exchanges
from sdd.plan.estimate import USABLE, check_share
from sdd.plan.gpus import Gpu
from sdd.plan.measure import MemoryCase
from sdd.plan.sharded import Trace, fake_world, trace
from sdd.train import RunConfig


@dataclass(frozen=True)
class LayoutPlan:
    """A run under one layout.

    Attributes:
        case: the run, the number of GPUs and the micro-batch.
        layout: resolved.
        gpu: the kind of GPU.
        cluster: how they are linked.
        mfu: assumed utilisation of the peak while a GPU computes.
        trace: what one GPU keeps and exchanges.
    """

    case: MemoryCase
    layout: ParallelConfig
    gpu: Gpu
    cluster: Cluster
    mfu: float
    trace: Trace

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step."""
        return self.case.run.data.batch_size // self.layout.data // self.case.micro_batch

    @property
    def accumulate(self) -> int:
        """The value of `--accumulate`."""
        return self.passes * self.layout.data

    @property
    def capacity(self) -> int:
        """Bytes of a GPU that the plan may fill."""
        return int(USABLE * self.gpu.memory * 2**30)

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return self.trace.memory.peak

    @property
    def fits(self) -> bool:
        """Whether the peak is within `capacity`."""
        return self.peak <= self.capacity

    @cached_property
    def exchanges(self) -> list[Exchange]:
        """What one GPU exchanges in a step, the longest first."""
        return exchanges(self.trace.traffic(self.passes), self.layout, self.cluster)

    @property
    def compute(self) -> float:
        """Seconds of a step without any exchange."""
        return self._flops / (self.case.gpus * self.mfu * self._peak_speed)

    @property
    def prefetched(self) -> float:
        """Seconds of exchanges beside which the model computes."""
        return sum(exchange.seconds for exchange in self.exchanges if exchange.prefetched)

    @property
    def waiting(self) -> float:
        """Seconds of exchanges that the model waits for."""
        return sum(exchange.seconds for exchange in self.exchanges if not exchange.prefetched)

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self.compute, self.prefetched) + self.waiting

    @property
    def whole_mfu(self) -> float:
        """Utilisation with the exchanges counted."""
        return self.mfu * self.compute / self.step

    @cached_property
    def _flops(self) -> float:
        run = self.case.run
        flops = training_flops(
            run.model,
            checkpoint_blocks=run.activation_checkpointing,
            fused_attention=self.case.has_fused_attention,
        )
        return flops.model * run.tokens_per_step

    @property
    def _peak_speed(self) -> float:
        return self.gpu.peak("bfloat16" if self.case.bfloat16 else "float32")

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON: bytes and seconds of one GPU and one step."""
        found = self.exchanges
        return {
            "layout": self.layout.sizes,
            "micro_batch": self.case.micro_batch,
            "accumulate": self.accumulate,
            "memory": {**self.trace.memory.to_dict(), "usable": self.capacity, "fits": self.fits},
            "traffic": {
                "inside": sum(exchange.inside for exchange in found),
                "between": sum(exchange.between for exchange in found),
                "exchanges": [exchange.to_dict() for exchange in found],
            },
            "time": {
                "compute": self.compute,
                "prefetched": self.prefetched,
                "waiting": self.waiting,
                "step": self.step,
                "mfu": self.whole_mfu,
                "tokens_per_second": self.case.run.tokens_per_step / self.step,
            },
        }


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        fitting: layouts that fit, the fastest first.
        too_large: layouts that do not fit, with one sequence at a time.
        left_out: layouts that were not looked at, by reason.
    """

    fitting: list[LayoutPlan]
    too_large: list[LayoutPlan]
    left_out: dict[str, list[ParallelConfig]]

    @property
    def best(self) -> LayoutPlan | None:
        """Of those that are within 1% of the fastest, the one with the smallest states; None if none fits."""
        near = [plan for plan in self.fitting if plan.step <= 1.01 * self.fitting[0].step]
        return min(near, key=lambda plan: plan.trace.memory.states, default=None)


class Planner:
    """Plans layouts of one run on given GPUs.

    Args:
        run: the run; its own `parallel` is not looked at.
        gpu: the kind of GPU.
        gpus: how many.
        cluster: how they are linked.
        mfu: assumed utilisation of the peak while a GPU computes.
        micro_batch: sequences at once on a GPU; None for as many as fit, or one if not even that fits.

    Raises:
        UserError: if the nodes do not divide the GPUs, or the utilisation is no share.
    """

    def __init__(
        self, run: RunConfig, gpu: Gpu, gpus: int, cluster: Cluster, *, mfu: float, micro_batch: int | None = None
    ) -> None:
        check_share(mfu)
        if gpus > cluster.gpus_per_node and gpus % cluster.gpus_per_node:
            raise UserError(
                f"--gpus {gpus} is no whole number of nodes of {cluster.gpus_per_node}: see --gpus-per-node"
            )
        self.run, self.gpu, self.gpus, self.cluster = run, gpu, gpus, cluster
        self.mfu, self.micro_batch = mfu, micro_batch
        self._first: dict[tuple[int, int, int], tuple[LayoutPlan, float]] = {}

    def plan(self, layout: ParallelConfig) -> LayoutPlan:
        """Plan a layout, with the largest micro-batch that fits.

        Args:
            layout: `shard=0` stands for what the others leave.

        Raises:
            UserError: if it does not fit the model, the number of GPUs or the batch.
        """
        layout = layout.resolved(self.gpus, self.run.model)
        rows, rest = divmod(self.run.data.batch_size, layout.data)
        if rest:
            raise UserError(
                f"a batch of {self.run.data.batch_size} sequences does not divide among the {layout.data} parts of "
                f"({layout}): give --batch-size {(rows + 1) * layout.data}, or another layout"
            )
        if self.micro_batch is not None:
            if rows % self.micro_batch:
                raise UserError(f"micro-batches of {self.micro_batch} do not divide the {rows} sequences of one GPU")
            return self._traced(layout, self.micro_batch)
        return self._largest(layout, divisors(rows))

    def search(self, report: Callable[[int, int], object] = lambda done, of: None) -> Search:
        """Plan every layout that the rules of this module leave.

        Args:
            report: called before each layout with the number of those done, and of all.
        """
        left_out: dict[str, list[ParallelConfig]] = {}
        reshard = self.run.parallel.reshard
        all_that_fit = (replace(layout, reshard=reshard) for layout in layouts(self.gpus, self.run.model))
        wanted = self._worth_a_look(all_that_fit, left_out)
        # less memory first: what does not fit then rules out more copies of it
        wanted.sort(key=lambda layout: (layout.expert, layout.tensor, layout.context, layout.replicate))
        found: list[LayoutPlan] = []
        with fake_world(self.gpus):
            for done, layout in enumerate(wanted):
                report(done, len(wanted))
                reason = next((why for why, plan in self._ruled_out(layout, found) if plan), None)
                if reason is not None:
                    left_out.setdefault(reason, []).append(layout)
                else:
                    found.append(self.plan(layout))
        fitting = sorted((plan for plan in found if plan.fits), key=lambda plan: plan.step)
        return Search(fitting, [plan for plan in found if not plan.fits], left_out)

    def _worth_a_look(
        self, candidates: Iterable[ParallelConfig], left_out: dict[str, list[ParallelConfig]]
    ) -> list[ParallelConfig]:
        kept: list[ParallelConfig] = []
        for layout in candidates:
            reason = next(self._rules(layout), None)
            (kept if reason is None else left_out.setdefault(reason, [])).append(layout)
        return kept

    def _rules(self, layout: ParallelConfig) -> Iterator[str]:
        per_node = min(self.cluster.gpus_per_node, self.gpus)
        if per_node % layout.tensor:
            yield "tensor groups that do not lie within one node"
        copy = self.gpus // layout.replicate
        if layout.replicate > 1 and copy > 1 and copy % per_node:
            yield "copies that are not whole nodes, nor single GPUs"
        rows, rest = divmod(self.run.data.batch_size, layout.data)
        if rest:
            yield f"a batch of {self.run.data.batch_size} sequences does not divide among them"
        elif self.micro_batch is not None and rows % self.micro_batch:
            yield f"micro-batches of {self.micro_batch} do not divide a GPU's sequences"

    @staticmethod
    def _ruled_out(layout: ParallelConfig, found: list[LayoutPlan]) -> Iterator[tuple[str, LayoutPlan | None]]:
        def like(fits: bool, *names: str) -> LayoutPlan | None:
            """A plan that is no larger in these dimensions, and the same in the others but for `shard`."""
            ours = layout.sizes
            for plan in found:
                theirs = plan.layout.sizes
                same = all(theirs[name] == ours[name] for name in ours if name not in (*names, "shard"))
                smaller = any(theirs[name] < ours[name] for name in names)
                if plan.fits == fits and same and smaller:
                    return plan
            return None

        yield "more copies of what does not fit", like(False, "replicate")
        yield "a smaller context dimension fits", like(True, "context")

    def _traced(self, layout: ParallelConfig, micro_batch: int) -> LayoutPlan:
        case = MemoryCase(self.run, self.gpus, micro_batch)
        return LayoutPlan(case, layout, self.gpu, self.cluster, self.mfu, trace(case, layout))

    def _largest(self, layout: ParallelConfig, sizes: list[int]) -> LayoutPlan:
        """The plan with the largest micro-batch that fits, or the smallest if none does.

        Memory grows with the micro-batch, and not evenly: the loss may take over the peak. So growth gives the first
        size to trace, and traces decide: the next size is looked at after one that fits, the middle after one that does
        not.
        """
        first, growth = self._growth(layout, sizes)
        index = _last(sizes, lambda size: first.peak + (size - 1) * growth <= first.capacity)
        low, high = -1, len(sizes)  # the last that fits, and the first that does not
        plans: dict[int, LayoutPlan] = {}
        while low + 1 < high:
            plan = first if first.layout == layout and sizes[index] == 1 else self._traced(layout, sizes[index])
            plans[index] = plan
            low, high = (index, high) if plan.fits else (low, index)
            index = low + 1 if plan.fits else (low + high) // 2
        return plans[max(low, 0)]

    def _growth(self, layout: ParallelConfig, sizes: list[int]) -> tuple[LayoutPlan, float]:
        """The plan of a like layout with one sequence at once, and the bytes that each further one adds."""
        key = layout.expert, layout.context, layout.tensor
        if key not in self._first:
            one = self._traced(layout, 1)
            grows = one.fits and len(sizes) > 1
            growth = (self._traced(layout, sizes[1]).peak - one.peak) / (sizes[1] - 1) if grows else math.inf
            self._first[key] = one, growth
        return self._first[key]


def _last(sizes: list[int], holds: Callable[[int], bool]) -> int:
    """The index of the last size of which this holds; 0 if it holds of none."""
    return max((index for index, size in enumerate(sizes) if holds(size)), default=0)
