"""Runs on several processes: gloo on the CPU, float32 unless said."""

import json
from dataclasses import replace

import pytest
import torch
from helpers_parallel import in_world
from helpers_train import TINY, UNEVEN, rows, tiny
from hypothesis import given
from hypothesis import strategies as st

from sdd.commands.main import main
from sdd.errors import Interrupted, RunFailed, UserError
from sdd.parallel import ParallelConfig
from sdd.placement import placements
from sdd.train import checkpoint as ckpt
from sdd.train.optim import optimizer_tensors
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, reopen, start

# one key-value head of 16 features has fewer rows than some worlds have processes in other matrices' alphas
CONFIG = replace(UNEVEN, steps=10, eval_every=5, eval_sequences=9, optim=replace(UNEVEN.optim, grad_clip=0.4))

# torch's float32 norm of a matrix of 131,072 numbers is off by 2e-5 on one process, by half that on two
NORM = 5e-5


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def everything(trainer):
    """Parameters and optimiser state by name, whole."""
    named = {f"model.{name}": whole(parameter) for name, parameter in trainer.model.named_parameters()}
    state = {f"optimizer.{name}": whole(tensor) for name, tensor in optimizer_tensors(trainer.optimizer).items()}
    return named | state | {"rng": torch.get_rng_state()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def numbers(found):
    """The arrays of what went over a pipe as lists, back as tensors."""
    return {name: torch.as_tensor(values) for name, values in found.items()}


def portable(found):
    return {name: tensor.numpy() for name, tensor in found.items()}


# --- the world


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_passes_keep_the_rows_in_memory_at_most_those_of_one_process(size, times, parts, rows):
    batch_size, accumulate = size * times * parts * rows, parts
    passes = World(0, size).passes(batch_size, accumulate)
    at_once, rest = divmod(batch_size, size * passes)
    assert rest == 0, "all passes are equal"
    assert at_once <= batch_size // accumulate
    assert World().passes(batch_size, accumulate) == accumulate


@given(st.integers(1, 9), st.integers(0, 40))
def test_shares_are_equally_long_and_cover_everything_once(size, n):
    shares = [World(rank, size).share(n) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert [index for share in shares for index in share.tolist() if index >= 0] == list(range(n))


def exchange(world):
    return {
        "any": [world.any(world.rank == 2), world.any(False)],
        "sum": world.sum(world.rank + 0.5),
        "mean": world.mean(torch.tensor([1.0, world.rank])).tolist(),
        "on main": world.on_main(lambda: f"from {world.rank}"),
        "turn": world.in_turn(lambda: world.rank),
    }


def test_every_rank_gets_what_is_exchanged():
    common = {"any": [True, False], "sum": 4.5, "mean": [1.0, 1.0], "on main": "from 0"}
    assert in_world(3, exchange) == [{**common, "turn": rank} for rank in range(3)]


def errors_of(world, culprits, error):
    """The error that this rank sees when the culprits raise, in each way of acting together."""

    def act():
        if world.rank in culprits:
            raise error(f"rank {world.rank} objects")

    found = []
    for how in (world.together, world.in_turn, *[world.on_main] * (0 in culprits)):
        try:
            how(act)
        except Exception as raised:
            found.append(f"{type(raised).__name__}: {raised}")
    return found


def test_an_error_of_one_rank_reaches_every_rank():
    assert in_world(3, errors_of, [1], UserError) == [["UserError: rank 1 objects"] * 2] * 3


def test_of_several_errors_a_rank_keeps_its_own_and_the_others_get_that_of_the_lowest():
    at_0, at_1, at_2 = in_world(3, errors_of, [0, 2], UserError)
    assert at_0[0] == at_1[0] == "UserError: rank 0 objects"
    assert at_2[0] == "UserError: rank 2 objects"


def test_an_unexpected_error_is_a_failed_run_on_the_other_ranks():
    at_0, at_1, _ = in_world(3, errors_of, [0], IndexError)
    assert at_0 == ["IndexError: rank 0 objects"] * 3
    assert at_1 == ["RunFailed: rank 0: IndexError: rank 0 objects"] * 3


# --- training


def train(world, config, out):
    trainer = start(config, out, world)
    found = {f"first.{name}": tensor for name, tensor in everything(trainer).items() if name.startswith("model.")}
    trainer.run()
    alphas = {f"alpha.{name}": p.detach() for name, p in trainer.model.named_parameters() if p.ndim < 2}
    return portable(found | alphas)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that one process makes of CONFIG."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, train(World(), CONFIG, out)


@pytest.mark.parametrize(
    ("size", "changes"),
    [(2, {"activation_checkpointing": True}), (4, {}), (4, {"parallel": ParallelConfig(replicate=2)})],
)
def test_several_processes_train_as_one_does(tmp_path, alone, size, changes):
    out, reference = alone
    found = in_world(size, train, replace(CONFIG, **changes), tmp_path / "run")
    for values in found:
        for name, value in values.items():
            if name.startswith("first."):
                assert (value == reference[name]).all(), f"{name} is drawn differently"
            else:
                assert (value == found[0][name]).all(), f"{name} drifts apart"
    ours, theirs = rows(tmp_path / "run"), rows(out)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & {"loss", "eval_loss", "eval_bits_per_byte"}:
            assert one[name] == pytest.approx(other[name], abs=1e-5)
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=NORM)
        assert one.get("tokens") == other.get("tokens")
    assert max(row["grad_norm"] for row in ours if "grad_norm" in row) > 2 * CONFIG.optim.grad_clip
    samples = [json.loads((run / "samples.jsonl").read_text()) for run in (tmp_path / "run", out)]
    assert samples[0] == samples[1]
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/*.safetensors"))) == size


def train_and_save(world, config, out):
    """Two steps and an evaluation, which must leave the parameters in their parts."""
    trainer = start(config, out, world)
    for step in range(2):
        trainer.train_step(step)
        trainer.step += 1
    trainer.evaluate()
    trainer.save()
    found = everything(trainer)
    trainer.run_dir.unlock()
    return portable(found)


def load_and_save(world, out, step):
    torch.manual_seed(123)
    trainer = reopen(out, world=world)
    assert trainer.step == step
    found = everything(trainer)
    loss = trainer.train_step(step)[0].item()
    trainer.step += 1
    trainer.save()
    after = everything(trainer)
    trainer.run_dir.unlock()
    return portable(found), portable(after), loss


def test_checkpoints_load_on_another_number_of_processes_bit_for_bit(tmp_path):
    out = tmp_path / "run"
    config = replace(CONFIG, data=replace(CONFIG.data, batch_size=24))  # which 2, 4 and 3 processes can share
    before, *_ = in_world(2, train_and_save, config, out)
    losses = []
    for step, size in enumerate((1, 4, 3, 2), 2):
        alone = size == 1
        answers = [load_and_save(World(), out, step)] if alone else in_world(size, load_and_save, out, step)
        for found, _, loss in answers:
            assert_equal(numbers(found), numbers(before))
            losses.append(loss)
        before = answers[-1][1]
        assert any("exp_avg_sq" in name and value.max() > 0 for name, value in before.items())
    assert len(set(losses)) == 4, "all ranks report the loss of the whole batch"


def test_a_sharded_checkpoint_holds_parts_of_matrices_and_one_copy_of_the_rest(tmp_path):
    in_world(2, train_and_save, CONFIG, tmp_path / "run")
    from safetensors.torch import load_file

    (path,) = ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")
    files = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    embedding = [file["model.embed.weight"].shape[0] for file in files]
    assert sorted(embedding) == [2048, 2049]
    assert sum("model.embed_norm.weight" in file for file in files) == 1
    assert sum("rng.cpu" in file for file in files) == 1


def two_steps(world, names, out):
    found = []
    for name in names:
        trainer = Trainer(replace(tiny(name), accumulate=2), RunDir(out), world=world)
        found.append([tuple(value.item() for value in trainer.train_step(step)) for step in range(2)])
    return found


def test_every_placement_is_trained_as_by_one_process(tmp_path):
    names = list(placements)
    for ours in in_world(2, two_steps, names, tmp_path):
        for name, one, other in zip(names, ours, two_steps(World(), names, tmp_path), strict=True):
            for (loss, norm), (other_loss, other_norm) in zip(one, other, strict=True):
                assert loss == pytest.approx(other_loss, abs=1e-5), name
                assert norm == pytest.approx(other_norm, rel=NORM), name


def dtypes(world, config, out):
    trainer = Trainer(config, RunDir(out), world=world)
    seen = {}

    def look(name):
        def hook(module, _args):
            seen.update({f"{name}.{key}": str(value.dtype) for key, value in module.named_parameters(recurse=False)})

        return hook

    for name, module in trainer.model.named_modules():
        module.register_forward_pre_hook(look(name))
    loss, norm = trainer.train_step(0)
    stored = {str(parameter.dtype) for parameter in trainer.model.parameters()}
    return seen, stored, loss.item(), norm.item()


def test_bfloat16_leaves_alphas_and_norms_in_float32(tmp_path):
    config = replace(CONFIG, precision="bfloat16")
    trainer = Trainer(config, RunDir(tmp_path))
    loss, norm = trainer.train_step(0)
    for seen, stored, our_loss, our_norm in in_world(2, dtypes, config, tmp_path):
        assert stored == {"torch.float32"}, "master weights"
        scales = {name: dtype for name, dtype in seen.items() if "alpha" in name or "norm" in name}
        matrices = {name: dtype for name, dtype in seen.items() if "proj.weight" in name}
        assert len(scales) == 1 + 2 * 4
        assert set(scales.values()) == {"torch.float32"}
        assert len(matrices) == 2 * 7
        assert set(matrices.values()) == {"torch.bfloat16"}
        assert our_loss == pytest.approx(loss.item(), abs=1e-5), "the products are those of autocast"
        assert our_norm == pytest.approx(norm.item(), rel=1e-4)


def compiled(world, config, out):
    trainer = Trainer(config, RunDir(out), world=world)
    return [trainer.train_step(step)[0].item() for step in range(3)]


@pytest.mark.layouts  # the suite compiles shared blocks in test_probe_of_runs.py, without inductor
@pytest.mark.skipif(" " in torch.__file__, reason="inductor's compiler call breaks at a space in torch's path")
def test_compiled_blocks_train_as_others_do(tmp_path):
    plain = in_world(2, compiled, CONFIG, tmp_path)
    fast = in_world(2, compiled, replace(CONFIG, compile=True), tmp_path)
    assert fast[0] == pytest.approx(plain[0], abs=1e-5)


# --- ends


def fails(world, out, how):
    config = {
        "diverges": tiny("postnorm", optim=replace(TINY.optim, lr=1e30, warmup=0, grad_clip=0.0)),
        "batch": replace(TINY, data=replace(TINY.data, batch_size=5)),
    }.get(how, TINY)
    if how == "other data":
        text = out.parent / f"{world.rank}.txt"
        text.write_text(f"the quick brown fox jumps over {world.rank} lazy dogs\n" * 3000)
        config = replace(config, data=replace(config.data, path=str(text)))
    if how == "no data" and world.rank == 1:
        config = replace(config, data=replace(config.data, path=str(out / "nowhere.npy")))
    try:
        trainer = start(config, out, world)
        if how == "disk" and world.rank == 1:
            ckpt.HuggingFaceStorageWriter.write_data = full
        if how == "signal" and world.rank == 1:
            trainer._signals.received = True
        trainer.run()
    except (UserError, RunFailed, Interrupted) as error:
        return type(error).__name__, str(error), error.rank
    return None


def full(*_):
    raise OSError(28, "No space left on device", "shard")


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("diverges", "Diverged", "rolled back 3 times"),
        ("batch", "UserError", "5 rows does not divide among 2 processes"),
        ("no data", "UserError", "no data at"),
        ("other data", "UserError", "do not see the same training data"),
        ("disk", "RunFailed", "cannot write shard: No space left"),
        ("signal", "Interrupted", "interrupted at step 1 and saved"),
    ],
)
def test_all_ranks_end_together_and_the_first_says_why(tmp_path, how, kind, text):
    answers = in_world(2, fails, tmp_path / "run", how)
    for answer in answers:
        assert answer is not None
        assert answer[0] == kind
        assert text in answer[1]
        assert answer[2] == 0
    assert list((tmp_path / "run").rglob(".tmp-*")) == []


def data_lost_by_one(world, out):
    trainer = start(TINY, out, world)
    if world.rank == 1:

        def batch(_):
            raise RunFailed("the file is gone")

        trainer.loader.batch = batch
        try:
            trainer.run()
        except RunFailed as error:
            return str(error), error.rank
    return None


def test_an_error_that_one_rank_meets_alone_is_told_by_it(tmp_path):
    assert in_world(2, data_lost_by_one, tmp_path / "run")[1] == (
        "step 0: the file is gone; the last checkpoint is none",
        1,
    )


def test_a_restarted_job_goes_on_with_its_own_run_only(tmp_path):
    run = tmp_path / "run"
    trainer = start(TINY, run, World(job="a"))
    trainer.run_dir.write_json("environment.json", trainer.environment())
    trainer.train_step(0)
    trainer.step = 1
    trainer.save()
    trainer.run_dir.unlock()
    for world in (World(restarted=True), World(job="a")):
        again = start(TINY, run, world)
        assert again.step == 1
        again.run_dir.unlock()
    for config, world in ((replace(TINY, seed=1), World(restarted=True)), (TINY, World(job="b")), (TINY, World())):
        with pytest.raises(UserError, match="holds a run already"):
            start(config, run, world)


def test_a_job_that_may_be_restarted_must_name_its_run(monkeypatch, capsys):
    environment = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "", "MASTER_PORT": 0, "TORCHELASTIC_MAX_RESTARTS": 1}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert main(["train", "nano"]) == 2
    assert "needs --out RUN" in capsys.readouterr().err


def damage_and_reopen(world, out):
    trainer = reopen(out, world=world)
    trainer.run_dir.unlock()
    return trainer.step


def test_damage_in_any_rank_s_file_is_passed_over_by_all(tmp_path):
    out = tmp_path / "run"
    in_world(2, train, replace(TINY, keep_checkpoints=0), out)
    newest = ckpt.list_checkpoints(out / "checkpoints")[-1]
    last = sorted(newest.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    (out / "result.json").unlink()
    assert in_world(2, damage_and_reopen, out) == [8, 8]
