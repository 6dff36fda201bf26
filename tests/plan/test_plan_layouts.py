"""Plans of layouts: what an exchange costs, the search, and the command."""

import json
import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.commands.main import main
from sdd.commands.train import parse
from sdd.parallel import ParallelConfig
from sdd.parallel.layout import DIMENSIONS
from sdd.plan import gpus
from sdd.plan.cluster import Cluster, exchanges, spanned
from sdd.plan.layouts import Planner
from sdd.plan.measure import PassMemory
from sdd.plan.sharded import Trace
from sdd.plan.traffic import Stream, Volume
from sdd.train import DataConfig, config_io, preset

sizes = st.sampled_from([1, 2, 3, 4])
mesh_layouts = st.builds(ParallelConfig, sizes, sizes, sizes, sizes, sizes)


def line_of(layout, dim):
    """The ranks of the group of rank 0 along one dimension."""
    names = [name for name in DIMENSIONS if getattr(layout, name)]
    stride = 1
    for name in reversed(names):
        if name == dim:
            return tuple(stride * place for place in range(getattr(layout, name)))
        stride *= getattr(layout, name)
    raise AssertionError


@given(mesh_layouts, st.sampled_from(DIMENSIONS))
def test_a_group_is_known_by_its_ranks(layout, dim):
    expected = (dim,) if getattr(layout, dim) > 1 else ()
    assert spanned(line_of(layout, dim), layout) == expected


@given(st.integers(2, 12), st.integers(1, 12), st.sampled_from(["all-gather", "reduce-scatter", "all-to-all"]))
def test_a_ring_sends_what_the_others_lack(n, per_node, kind):
    """All links together: `S (n - 1)` bytes, whatever the nodes; an all-reduce sends twice as much."""
    layout, cluster = ParallelConfig(shard=n), Cluster(per_node, 100, 10)
    stream = Stream(kind, tuple(range(n)), True)
    (found,) = exchanges({stream: Volume(1, 1000)}, layout, cluster)
    assert n * (found.inside + found.between) == pytest.approx(1000 * (n - 1))
    (twice,) = exchanges({stream._replace(kind="all-reduce"): Volume(1, 1000)}, layout, cluster)
    if kind != "all-to-all":
        assert (twice.inside, twice.between) == pytest.approx((2 * found.inside, 2 * found.between))
    if n <= per_node:
        assert found.between == 0
    if per_node == 1:
        assert found.inside == 0


@given(st.integers(1, 6), st.integers(1, 6))
def test_a_ring_leaves_each_node_once(nodes, per_node):
    if nodes * per_node == 1:
        return
    layout = ParallelConfig(shard=nodes * per_node)
    stream = Stream("all-gather", tuple(range(nodes * per_node)), True)
    (found,) = exchanges({stream: Volume(1, 10**6)}, layout, Cluster(per_node, 100, 10))
    share = found.between / (found.inside + found.between)
    assert share == pytest.approx(0 if nodes == 1 else 1 / per_node)


def test_the_worst_group_counts():
    """Three neighbours in nodes of eight: those of rank 0 share a node, ranks 6 to 8 do not."""
    layout = ParallelConfig(shard=8, tensor=3)
    (found,) = exchanges({Stream("all-gather", (0, 1, 2), False): Volume(1, 900)}, layout, Cluster(8, 100, 10))
    assert found.between > 0


@given(st.floats(1, 1000), st.floats(1, 1000))
def test_time_follows_from_the_slower_link_and_the_steps(link, network):
    layout = ParallelConfig(shard=16)
    volume = Volume(2, 10**9)
    (found,) = exchanges({Stream("all-gather", tuple(range(16)), True): volume}, layout, Cluster(8, link, network))
    steps = 2 * (14 * 1.9e-6 + 4.0e-6)
    assert found.seconds == pytest.approx(max(found.inside / link, found.between / network) / 1e9 + steps)


def fake_trace(case, layout):
    """Memory that falls with shards and context and grows with the micro-batch; FSDP2 gathers it all."""
    states = 2**34 // (layout.shard * layout.tensor)
    held = case.micro_batch * 2**32 // (layout.context * layout.tensor)
    streams = {Stream("all-gather", tuple(range(0, case.gpus, layout.tensor)), True): Volume(1, states)}
    if layout.tensor > 1:
        streams[Stream("all-reduce", tuple(range(layout.tensor)), False)] = Volume(4, held)
    return Trace(states, states, 2 * states, PassMemory(held, 0, held, held, held, held, held, held), streams, {})


@pytest.fixture
def planner(monkeypatch):
    def build(n_gpus, batch=64, gpu="H100-SXM", **options):
        monkeypatch.setattr("sdd.plan.layouts.trace", fake_trace)
        run = replace(preset("1b"), accumulate=1, data=DataConfig(batch_size=batch), precision="bfloat16")
        return Planner(run, gpus[gpu], n_gpus, Cluster(8, 450, 50), **{"mfu": 0.4, **options})

    return build


@pytest.mark.parametrize("n_gpus", [8, 16, 64, 1024])
def test_every_layout_is_planned_or_left_out_for_a_reason(planner, n_gpus):
    from sdd.parallel import layouts

    search = planner(n_gpus, batch=1024).search()
    seen = [plan.layout for plan in (*search.fitting, *search.too_large)]
    seen += [layout for found in search.left_out.values() for layout in found]
    assert sorted(map(str, seen)) == sorted(map(str, layouts(n_gpus, preset("1b").model)))
    assert [plan.step for plan in search.fitting] == sorted(plan.step for plan in search.fitting)


@settings(max_examples=8)
@given(st.sampled_from([8, 16, 64]), st.sampled_from([64, 96, 1024]), st.sampled_from(["H100-SXM", "A100-40", "B200"]))
def test_the_micro_batch_is_the_largest_that_fits(n_gpus, batch, gpu):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdd.plan.layouts.trace", fake_trace)
        run = replace(preset("1b"), accumulate=1, data=DataConfig(batch_size=batch), precision="bfloat16")
        search = Planner(run, gpus[gpu], n_gpus, Cluster(8, 450, 50), mfu=0.4).search()
        for plan in search.fitting:
            rows = batch // plan.layout.data
            fits = [n for n in range(1, rows + 1) if rows % n == 0 and _peak(plan, n) <= plan.capacity]
            assert plan.case.micro_batch == max(fits)
            assert plan.passes * plan.case.micro_batch * plan.layout.data == batch


def _peak(plan, micro_batch):
    return fake_trace(replace(plan.case, micro_batch=micro_batch), plan.layout).memory.peak


def test_the_best_is_among_the_fastest_and_smallest(planner):
    search = planner(64).search()
    assert search.best is not None
    assert search.best.step <= 1.01 * search.fitting[0].step
    near = [plan for plan in search.fitting if plan.step <= 1.01 * search.fitting[0].step]
    assert all(search.best.trace.memory.states <= plan.trace.memory.states for plan in near)


def test_a_step_is_the_longer_of_compute_and_prefetched_and_what_it_waits_for(planner):
    for plan in planner(64).search().fitting:
        assert plan.step == pytest.approx(max(plan.compute, plan.prefetched) + plan.waiting)
        assert plan.whole_mfu <= plan.mfu
    slow = planner(64, mfu=0.2).search().fitting[0]
    assert slow.compute == pytest.approx(2 * planner(64).search().fitting[0].compute)


NANO = "plan nano --gpu a10 --gpus 4 --gpus-per-node 2 --batch-size 8 --context 64 --micro-batch 1"


def test_the_command_proposes_a_line_that_train_takes(tmp_path, capsys):
    base = preset("nano")
    config_io.save(replace(base, model=replace(base.model, n_layers=1)), tmp_path / "one.json")
    words = NANO.replace("nano", str(tmp_path / "one.json")).split()
    assert main([*words, "--best", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    words = shlex.split(found["command"])
    assert words[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "2"]
    config, _ = parse(words[words.index("train") + 1 :])
    assert config.parallel.resolved(4, config.model) == ParallelConfig(**found["best"]["layout"])
    assert (config.accumulate, config.data.batch_size, config.model.context) == (found["best"]["accumulate"], 8, 64)
    for plan in found["layouts"]:
        between = sum(exchange["between"] for exchange in plan["traffic"]["exchanges"])
        assert plan["traffic"]["between"] == pytest.approx(between)


@pytest.mark.parametrize("own", [ParallelConfig(tensor=2, reshard="never"), ParallelConfig(2, 2)])
def test_the_layout_of_a_config_does_not_bind_a_search_nor_spoil_its_line(own, tmp_path, capsys):
    base = preset("nano")
    model = replace(base.model, n_layers=1, context=16)
    config_io.save(replace(base, parallel=own, model=model), tmp_path / "config.json")
    words = ["plan", str(tmp_path / "config.json"), "--gpu", "a10", "--batch-size", "1", "--best", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    words = shlex.split(found["command"])
    config, _ = parse(words[words.index("train") + 1 :])
    layout = replace(own, **found["best"]["layout"])
    assert config.parallel.resolved(1, config.model) == layout


def test_a_layout_is_planned_by_its_options(capsys):
    assert main([*NANO.split(), "--parallel.tensor", "2", "--link", "10", "--network", "1"]) == 0
    text = capsys.readouterr().out
    for word in (
        "shard 2, tensor 2",
        "reduce-scatter",
        "compute waits",
        "10 GB/s inside",
        "not a measurement",
        "To run",
    ):
        assert word in text
    assert max(map(len, text.split("To run")[0].splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--parallel.tensor 3", "parallel (tensor 3) is for 3 processes"),
        ("--gpus 8 --parallel.tensor 8", "parallel.tensor=8 does not divide model.n_heads=4"),
        ("--parallel.tensor 64", "the nearest layout of 4 processes"),
        ("--gpus 100000000 --parallel.tensor 3", "the nearest layout of 100000000 processes"),
        ("--parallel.tensor x", "parallel.tensor='x'"),
        ("--best --parallel.tensor 2", "leave its sizes out"),
        ("--best --gpus 2048", "search layouts of up to 1,024 GPUs, not of 2,048: plan one by its sizes"),
        ("--layouts --parallel.context_attention ring", "leave out --parallel.context_attention ring"),
        ("--parallel.context 2 --parallel.context_attention ring", "a plan traces gathered keys and values: leave out"),
        ("--layouts --gpus 3", "no whole number of nodes of 2"),
        ("--layouts --link 0", "'0' is not a bandwidth"),
        ("--layouts --network nan", "'nan' is not a bandwidth"),
        ("--layouts --gpus-per-node 0", "'0' is not a whole number"),
        ("--layouts --mfu 2", "mfu=2 is not a share"),
        ("--layouts --batch-size 3 --micro-batch 2", "no layout of 4 GPUs is left"),
        ("--parallel.shard 4 --batch-size 6", "give --batch-size 8, or another layout"),
        ("--parallel.shard 4 --micro-batch 3", "micro-batches of 3 do not divide the 2 sequences"),
    ],
)
def test_a_mistake_is_one_clear_line(words, expected, capsys):
    assert main([*NANO.split(), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdd: ")
    assert expected in err
    assert err.count("\n") == 1


def test_what_does_not_fit_is_said(capsys):
    line = "plan 2b --gpu a10 --gpus 2 --batch-size 2 --activation-checkpointing false --best"
    assert main(line.split()) == 2
    assert "no layout of 2 GPUs fits: the smallest (" in capsys.readouterr().err
