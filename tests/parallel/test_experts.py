"""The exchange of rows between processes that share experts."""

import torch
from helpers_processes import in_processes
from torch.distributed.device_mesh import init_device_mesh

from sdd.kernels.experts import sort_by_expert
from sdd.parallel.experts import Exchange

E, K, C = 8, 2, 3
#: Of a case: how many tokens each of four processes has, and which experts they may choose.
CASES = {
    "all experts": ([5, 7, 2, 9], range(E)),
    "one process has no tokens": ([4, 0, 3, 1], range(E)),
    "one process holds all experts that are chosen": ([6, 5, 4, 3], [2, 3]),
    "nobody has tokens": ([0, 0, 0, 0], range(E)),
}


def drawn(rank, name):
    """The tokens of a process and their experts, with numbers that no other process has."""
    numbers, allowed = CASES[name]
    generator = torch.Generator().manual_seed(1000 * rank + len(name))
    x = torch.randn(numbers[rank], C, dtype=torch.float64, generator=generator)
    choices = torch.tensor(list(allowed))
    picks = [choices[torch.randperm(len(choices), generator=generator)[:K]] for _ in range(numbers[rank])]
    return x, torch.stack(picks) if picks else torch.empty(0, K, dtype=torch.int64)


def factors(experts):
    return (experts + 1).double().unsqueeze(1)


def exchanged(rank):
    """Rows times the number of their expert, computed where the expert is; what each process saw; what it sent."""
    exchange = Exchange(init_device_mesh("cpu", (4,), mesh_dim_names=("expert",)))
    found = {}
    for name in CASES:
        x, experts = drawn(rank, name)
        order = sort_by_expert(experts, E)
        rows = x[order.tokens_M].requires_grad_()
        seen = []

        def compute(rows_RC, here, seen=seen):
            seen += list(zip(here.experts_M.tolist(), rows_RC.detach().tolist(), strict=True))
            assert here.ends_E.tolist() == [sum(e <= last for e, _ in seen) for last in range(E // 4)]
            return rows_RC * factors(2 * rank + here.experts_M)

        exchange.sent_bytes = 0
        y = exchange.through(compute, rows, order)
        weights = torch.arange(1.0, C + 1, dtype=torch.float64)
        (y * weights).sum().backward()
        expected = factors(order.experts_M)
        found[name] = {
            "output": torch.equal(y, rows * expected),
            "gradient": torch.equal(rows.grad, (weights * expected).expand_as(rows)),
            "own": sorted((int(e), row) for e, row in zip(order.experts_M, rows.tolist(), strict=True)),
            "seen": [(2 * rank + e, row) for e, row in seen],
            "sent": exchange.sent_bytes,
        }
    return found


def test_every_row_is_computed_where_its_expert_is_and_comes_back():
    answers = in_processes(4, exchanged)
    for name in CASES:
        found = [answer[name] for answer in answers]
        for rank, each in enumerate(found):
            assert each["output"], name
            assert each["gradient"], name
            assert [e for e, _ in each["seen"]] == sorted(e for e, _ in each["seen"]), name
            assert all(e // 2 == rank for e, _ in each["seen"]), name
        rows = sorted(row for each in found for row in each["own"])
        assert sorted(row for each in found for row in each["seen"]) == rows, f"{name}: every row once"


def test_the_bytes_are_those_of_the_rows_that_leave_their_process():
    """Each goes and comes back, and so does its gradient; float64 has 8 bytes."""
    answers = in_processes(4, exchanged)
    for name in CASES:
        away = sum(e // 2 != rank for rank, answer in enumerate(answers) for e, _ in answer[name]["own"])
        assert sum(answer[name]["sent"] for answer in answers) == 4 * away * C * 8, name
