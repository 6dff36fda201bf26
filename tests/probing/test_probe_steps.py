"""A probe in a training loop: when it looks, what it leaves alone, and what it does not trip over."""

import copy
import gc
import json
import logging
import math

import pytest
import torch
from helpers_probing import assert_close, drawn_tokens, parameters_of, tiny_model
from torch import nn
from torch._C import _len_torch_function_stack
from torch._dynamo.testing import CompileCounterWithBackend

import sdd
from sdd import probe_points
from sdd.probing import read_probe, recorder


class Dropout(nn.Module):
    """A model that draws random numbers in every forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.5)) for _ in range(3))
        )

    def forward(self, x, y):
        return nn.functional.mse_loss(self.layers(x), y)


def batches(n, **changes):
    return [drawn_tokens(seed=seed, **changes) for seed in range(n)]


def train(model, optimizer, data, after_step=lambda: None):
    """Losses of a plain loop."""
    losses = []
    for tokens in data:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after_step()
    return losses


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(sdd.param_groups(model), lr=lr, fused=True)


def rows_of(model, data, every=1, **changes):
    rows = []
    optimizer = adamw(model)
    with sdd.Probe(model, optimizer, every, rows.append, **changes):
        train(model, optimizer, data)
    return rows


def assert_bare(model):
    """No hook is left on any module, and nothing records."""
    assert not probe_points.recording()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- training is left alone


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("placement", ["sdd-released", "prenorm", "hybrid", "deepnorm"])
def test_training_is_the_same_bit_for_bit(placement, checkpointing):
    found = []
    for probed in (False, True):
        model = tiny_model(placement, eliminate_norms=False)
        model.checkpoint_blocks = checkpointing
        optimizer = adamw(model)
        with sdd.Probe(model, optimizer, every=2 if probed else 0):
            found.append((train(model, optimizer, batches(5)), parameters_of(model)))
    (losses, parameters), (probed_losses, probed_parameters) = found
    assert losses == probed_losses
    assert all(torch.equal(parameters[name], probed_parameters[name]) for name in parameters)


def test_random_numbers_are_left_alone():
    found = []
    for probed in (False, True):
        model = Dropout()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with sdd.Probe(model, optimizer, every=int(probed)):
            for seed in range(3):
                x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed))
                model(x, y).backward()
                optimizer.step()
        found.append((parameters_of(model), torch.get_rng_state()))
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    assert torch.equal(found[0][1], found[1][1])


# --- which steps


@pytest.mark.parametrize(("every", "done", "steps"), [(3, 0, [1, 3, 6]), (1, 4, [5, 6, 7]), (50, 0, [1]), (0, 0, [])])
def test_the_first_step_and_every_few_are_probed(every, done, steps):
    model = tiny_model("sdd")
    rows = rows_of(model, batches(7 - done), every, done=done)
    assert [row["step"] for row in rows] == steps
    assert_bare(model)


def test_hooks_are_there_for_probed_steps_only():
    model = tiny_model("sdd")
    optimizer = adamw(model)
    seen = []
    with sdd.Probe(model, optimizer, every=3) as probe:
        train(model, optimizer, batches(4), after_step=lambda: seen.append(probe_points.recording()))
        assert probe.done == 4
    assert seen == [False, True, False, False]
    train(model, optimizer, batches(2))
    assert probe.done == 4, "a closed probe does not follow"


def test_a_step_that_is_said_is_the_step_that_is_followed():
    expected = rows_of(tiny_model("sdd-released"), batches(4), every=2)
    model = tiny_model("sdd-released")
    optimizer, rows = adamw(model), []
    probe = sdd.Probe(model, every=2, out=rows.append)
    for tokens in batches(4):
        with probe.step(optimizer):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
        optimizer.zero_grad()
    assert rows == expected
    assert_bare(model)
    with probe.step(number=10):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert probe.latest["step"] == 10
    assert "update_ratio" not in probe.latest["sites"]["embed"]
    assert probe.latest["sites"]["embed"]["weight_norm"] == pytest.approx(model.embed.weight.norm().item(), rel=1e-4)
    assert probe.latest["sites"]["embed"]["weight_grad_rms"] > 0


def test_a_step_that_fails_leaves_nothing_behind():
    model = tiny_model("sdd")
    rows = []
    probe = sdd.Probe(model, out=rows.append)
    with pytest.raises(IndexError), probe.step(adamw(model)):
        model(drawn_tokens(vocab_size=100))  # no such tokens
    assert rows == []
    assert_bare(model)


def test_an_interrupt_leaves_nothing_behind():
    """No hook of a module runs when a KeyboardInterrupt leaves its forward."""

    class Interrupted(nn.Linear):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(2, 2), Interrupted(2, 2))
    with pytest.raises(KeyboardInterrupt), sdd.Probe(model, torch.optim.SGD(model.parameters())):
        model(torch.ones(2))
    assert_bare(model)
    assert _len_torch_function_stack() == 0


def test_a_probe_that_is_lost_lets_go():
    model = tiny_model("sdd")
    sdd.Probe(model, adamw(model))
    gc.collect()
    assert_bare(model)


def test_mistakes_are_told():
    model = tiny_model("sdd")
    with sdd.Probe(model, adamw(model)) as probe, pytest.raises(RuntimeError, match="follows its optimiser"):
        probe.step().__enter__()
    with pytest.raises(ValueError, match="every=-1"):
        sdd.Probe(model, every=-1)


# --- several models


def test_models_that_train_side_by_side_have_probes_of_their_own():
    expected = [rows_of(tiny_model(name), batches(2)) for name in ("sdd", "prenorm")]
    models = [tiny_model(name) for name in ("sdd", "prenorm")]
    rows = [[], []]
    optimizers = [adamw(model) for model in models]
    probes = [sdd.Probe(*each, 1, found.append) for *each, found in zip(models, optimizers, rows, strict=True)]
    for tokens in batches(2):
        losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in models]
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for probe in probes:
        probe.close()
    assert rows == expected


def test_a_copy_of_a_model_is_not_recorded():
    expected = rows_of(tiny_model("sdd-released"), batches(2))
    model, rows = tiny_model("sdd-released"), []
    optimizer = adamw(model)
    with sdd.Probe(model, optimizer, 1, rows.append):
        average = copy.deepcopy(model)
        tokens = drawn_tokens(seed=5)
        average(tokens[:, :-1], tokens[:, 1:]).backward()
        train(model, optimizer, batches(2))
    assert rows == expected


# --- what counts


def test_evaluations_between_steps_do_not_count():
    expected = rows_of(tiny_model("sdd"), batches(2))
    model = tiny_model("sdd")
    optimizer, rows = adamw(model), []

    def evaluate():
        with torch.no_grad():
            model(drawn_tokens(seed=9))

    with sdd.Probe(model, optimizer, 1, rows.append):
        evaluate()
        train(model, optimizer, batches(2), evaluate)
    assert rows == expected


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_gradients_before_and_after_clipping(scale):
    model = tiny_model("sdd")
    optimizer, rows = adamw(model), []
    with sdd.Probe(model, optimizer, 1, rows.append) as probe:
        for early in (True, False):
            model.load_state_dict(tiny_model("sdd").state_dict())
            tokens = drawn_tokens()
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            if early:
                probe.gradients_ready()
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            nn.utils.clip_grad_norm_(model.parameters(), scale * norm)
            optimizer.step()
            optimizer.zero_grad()
    before, after = (row["sites"]["blocks.0.attn.q_proj"] for row in rows)
    for stat in ("weight_grad_rms", "alpha_grad_rms"):
        assert after[stat] == pytest.approx(scale * before[stat], rel=1e-3)


def test_recomputed_activations_do_not_count(monkeypatch):
    calls = []
    original = recorder.sampled_attention
    monkeypatch.setattr(recorder, "sampled_attention", lambda *a: calls.append(0) or original(*a))
    expected = rows_of(tiny_model("sdd-paper"), batches(1))
    assert len(calls) == 2
    model = tiny_model("sdd-paper")
    model.checkpoint_blocks = True
    (row,) = rows_of(model, batches(1))
    assert len(calls) == 4
    assert [row] == expected


def test_a_closure_and_several_optimizers():
    expected = rows_of(tiny_model("sdd"), batches(3))
    model = tiny_model("sdd")
    groups = sdd.param_groups(model)
    optimizers = [torch.optim.AdamW([group], lr=1e-2) for group in groups]
    rows = []
    with sdd.Probe(model, optimizers, 1, rows.append):
        for tokens in batches(3):

            def closure(tokens=tokens):
                model.zero_grad()
                loss = model(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
                return loss

            assert optimizers[0].step(closure).isfinite(), "the closure's answer is handed on"
            for optimizer in optimizers[1:]:
                optimizer.step()
    for row, other in zip(rows, expected, strict=True):
        assert_close(row["sites"], other["sites"])


def test_a_diverged_step_is_recorded_as_it_is(tmp_path):
    model = tiny_model("prenorm")
    with torch.no_grad():
        model.blocks[1].ffn.down_proj.weight[0, 0] = math.nan
        model.blocks[0].ffn.down_proj.weight[0, 0] = math.inf
    optimizer = adamw(model)
    with sdd.Probe(model, optimizer, 1, tmp_path / "new" / "probe.jsonl"):
        train(model, optimizer, batches(1))
    assert "NaN" not in (tmp_path / "new" / "probe.jsonl").read_text()
    found = read_probe(tmp_path / "new" / "probe.jsonl")
    assert found.series("blocks.0.ffn.down_proj", "rms")[0] == math.inf
    assert math.isnan(found.series("blocks.1.attn.q_proj", "rms")[0])
    assert math.isfinite(found.series("blocks.0.attn.q_proj", "rms")[0])
    assert math.isnan(found.layers["rms"][0, 2])


# --- the file


def test_rows_are_appended_and_read_back(tmp_path):
    file = tmp_path / "probe.jsonl"
    rows = rows_of(tiny_model("sdd"), batches(3))
    model = tiny_model("sdd")
    optimizer = adamw(model)
    for part, done in ((batches(3)[:2], 0), (batches(3)[2:], 2)):
        with sdd.Probe(model, optimizer, 1, str(file), done=done):
            train(model, optimizer, part)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    assert read_probe(file).steps.tolist() == [1, 2, 3]


# --- compiled models


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it on purpose
@pytest.mark.parametrize(
    ("how", "backend"), [("blocks", "aot_eager"), ("model", "eager"), ("wrapper", "eager"), ("function", "eager")]
)
def test_compiled_models_run_eagerly_in_probed_steps_and_are_compiled_once(how, backend):
    expected = rows_of(tiny_model("sdd-released", n_layers=1), batches(6), every=3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model = trained = watched = tiny_model("sdd-released", n_layers=1)
    if how == "blocks":
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
    elif how == "model":
        model.compile(backend=counter, fullgraph=True)
    elif how == "wrapper":
        trained = watched = torch.compile(model, backend=counter, fullgraph=True)
    else:
        trained = torch.compile(lambda *tokens: model(*tokens), backend=counter, fullgraph=True)
    optimizer, rows, compiled = adamw(model), [], []
    with sdd.Probe(watched, optimizer, 3, rows.append):
        train(trained, optimizer, batches(6), lambda: compiled.append(counter.frame_count))
    assert compiled == [0, 1, 1, 1, 1, 1], "steps 1, 3 and 6 are probed"
    assert [row["step"] for row in rows] == [1, 3, 6]
    for row, other in zip(rows, expected, strict=True):
        assert_close(row["sites"], other["sites"], rel=1e-3)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
def test_an_optimizer_whose_step_is_compiled():
    expected = rows_of(tiny_model("sdd", n_layers=1), batches(4), every=2)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, rows = tiny_model("sdd", n_layers=1), []
    optimizer = torch.optim.AdamW(sdd.param_groups(model), lr=1e-2)
    step = torch.compile(optimizer.step, backend=counter)
    with sdd.Probe(model, optimizer, 2, rows.append):
        for tokens in batches(4):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            step()
            optimizer.zero_grad()
    assert counter.frame_count == 1, "step 3 is compiled, the others are probed"
    for row, other in zip(rows, expected, strict=True):
        assert_close(row["sites"], other["sites"], rel=1e-3)
    torch._dynamo.reset()


@pytest.mark.slow
def test_points_are_no_part_of_a_compiled_graph():
    """Points add no graph break and no operation, and the graph does not depend on whether a probe records."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(tiny_model("sdd-released", n_layers=1), backend=keep, fullgraph=True)
    compiled(drawn_tokens())
    probe_points.add(None)  # pyright: ignore[reportArgumentType]
    compiled(drawn_tokens(seed=3))
    probe_points.remove(None)  # pyright: ignore[reportArgumentType]
    assert len(graphs) == 1
    torch._dynamo.reset()


# --- what it says


def test_attention_that_cannot_be_seen_is_told_once(caplog):
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ self.proj(x)

    model = nn.Sequential(SelfAttention(), SelfAttention())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING), sdd.Probe(model, optimizer, 1):
        for _ in range(3):
            model(torch.randn(2, 3, 4)).sum().backward()
            optimizer.step()
    assert [record.getMessage().split(" does")[0] for record in caplog.records] == [
        "no statistics of attention: SelfAttention"
    ]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    model = tiny_model("sdd-released").cuda()
    optimizer = adamw(model)
    tokens = drawn_tokens().cuda()
    rows = []
    probe = sdd.Probe(model, optimizer, 2, rows.append)
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    probe.close()
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
