"""sdd.convert: what changes in a model, what does not, and that the result trains."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd import SDDLinear
from sdd.conversion import apply, convert


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(F.relu(self.up_proj(self.norm(x))))


class Net(nn.Module):
    """A next-token model without mixing: enough to train."""

    def __init__(self, n_layers: int = 4, width: int = 16, hidden: int = 32, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(n_layers))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- what becomes of a layer ---


def test_every_linear_but_the_head_becomes_an_sdd_linear_in_place():
    model = Net()
    before = bits(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    report = convert(model)
    layers = {f"blocks.{i}.{name}" for i in range(4) for name in ("up_proj", "down_proj")}
    assert {name for name, module in model.named_modules() if isinstance(module, SDDLinear)} == layers
    assert [layer.name for layer in report.converted] == [name for name in modules if name in layers]
    assert dict(model.named_modules()) == modules  # the same objects
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert after.keys() - parameters.keys() == {f"{name}.alpha" for name in layers}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(value, before[name]), name
    assert type(model.lm_head) is nn.Linear


def test_a_converted_layer_is_what_sdd_linear_builds():
    model = nn.ModuleDict({"a": nn.Linear(4, 8)})
    convert(model, alpha_init=0.5, eps=1e-4)
    built = SDDLinear(4, 8, alpha_init=0.5, eps=1e-4)
    assert vars(model["a"]).keys() == vars(built).keys()
    assert model["a"]._parameters.keys() == built._parameters.keys()
    assert repr(model["a"]) == repr(built)
    built.load_state_dict(model["a"].state_dict())
    x = torch.randn(3, 4)
    for twin in (built, copy.deepcopy(model["a"])):
        assert torch.equal(twin(x), model["a"](x))


def test_a_checkpoint_of_the_converted_model_needs_alpha():
    model = Net(1)
    convert(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = Net(1)
    convert(other)
    other.load_state_dict(state)
    assert torch.equal(other(torch.arange(11)), model(torch.arange(11)))
    del state["blocks.0.up_proj.alpha"]
    with pytest.raises(RuntimeError, match=r"up_proj\.alpha"):
        other.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_dtype_bias_and_flags_stay(dtype, bias):
    model = nn.Sequential(nn.Linear(6, 8, bias, dtype=dtype), nn.Linear(8, 4, dtype=dtype)).eval()
    model[0].weight.requires_grad_(False)
    convert(model, include=["0", "1"])  # a frozen layer is converted only if it is named
    first, second = model
    assert (first.bias is not None) == bias
    assert not first.training
    assert not first.weight.requires_grad
    assert not first.alpha.requires_grad
    assert second.weight.requires_grad
    assert second.alpha.requires_grad
    assert first.weight.dtype == second.bias.dtype == dtype
    assert first.alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y = model(torch.randn(3, 6).to(dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert second.alpha.grad is not None


def test_hooks_stay_and_fire():
    model = nn.Sequential(nn.Linear(4, 8))
    calls = []
    model[0].register_forward_pre_hook(lambda module, args: calls.append("pre"))
    model[0].register_forward_hook(lambda module, args, output: calls.append("forward"))
    model[0].register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
    model[0].weight.register_hook(lambda grad: calls.append("weight"))
    convert(model)
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["backward", "forward", "pre", "weight"]


def test_a_module_with_two_names_is_converted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": shared})
    report = convert(model)
    assert [layer.name for layer in report.converted] == ["a", "b"]
    assert model["a"] is model["c"] is shared
    assert isinstance(shared, SDDLinear)
    # either name selects it
    model = nn.ModuleDict({"a": (twice := nn.Linear(4, 4)), "b": nn.Linear(4, 4), "c": twice})
    report = convert(model, exclude="c")
    assert [layer.name for layer in report.converted] == ["b"]


def test_a_single_layer_can_be_the_model():
    layer = nn.Linear(4, 8)
    assert [converted.name for converted in convert(layer).converted] == [""]
    assert isinstance(layer, SDDLinear)


# --- the draw ---


def test_sizes_that_a_model_gives_as_tensors_are_numbers_in_the_report():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    model[0].in_features, model[0].out_features = torch.tensor(8), torch.tensor(6)
    report = convert(model, include=["0"])
    assert [type(size) for size in report.converted[0].shape] == [int, int]
    assert type(report.share) is float
    assert apply(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), report.to_json())


class Refusing:
    """A config of which nothing can be read, as transformers' `head_dim` where it differs between layers."""

    def __getattr__(self, name: str):
        raise AttributeError(name) if name.startswith("__") else RuntimeError(f"{name} is ambiguous")


@pytest.mark.parametrize("projections", [("q_proj", "k_proj"), ("qkv_proj",), ("kv_a_proj", "gate_up_proj")])
def test_a_config_that_raises_errors_counts_as_none(projections):
    def report(config: object | None) -> str:
        torch.manual_seed(0)
        model = Net()
        for module in model.modules():
            if isinstance(module, Block):
                module.attention = nn.ModuleDict({name: nn.Linear(16, 48) for name in projections})
            module.config = config
        return str(convert(model, example=torch.tensor([[1, 2]])))

    assert report(Refusing()) == report(None)


def test_reinit_draws_at_half_the_papers_std():
    model = nn.ModuleDict({"a": nn.Linear(40, 2000)})
    convert(model, generator=torch.Generator().manual_seed(0))
    std = 0.5 / math.sqrt(2.5 * 40)
    weight = model["a"].weight.detach()
    tail = 3 * math.exp(-4.5) * math.sqrt(2 / math.pi) / math.erf(3 / math.sqrt(2))
    assert weight.abs().max() <= 3 * std
    assert weight.abs().max() > 2.9 * std
    assert weight.std() == pytest.approx(std * math.sqrt(1 - tail), rel=0.01)
    assert weight.mean().abs() < 0.01 * std
    assert not model["a"].bias.any()


def test_a_generator_makes_the_draw_reproducible_and_independent_of_the_dtype():
    def converted(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Net(2).to(dtype)
        torch.seed()  # the global state plays no part
        convert(model, generator=torch.Generator().manual_seed(seed))
        return model.state_dict()

    first, again, other, half = converted(1), converted(1), converted(2), converted(1, torch.bfloat16)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.up_proj.weight"], other["blocks.0.up_proj.weight"])
    assert not torch.equal(first["blocks.0.up_proj.weight"], first["blocks.1.up_proj.weight"])
    assert all(torch.equal(first[name].to(value.dtype), value) for name, value in half.items())


def test_without_a_generator_the_global_seed_counts():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 8)})
    state = torch.get_rng_state()
    convert(model)
    first = model["a"].weight.clone()
    torch.set_rng_state(state)
    model = nn.ModuleDict({"a": nn.Linear(4, 8, device="meta").to_empty(device="cpu")})
    torch.set_rng_state(state)
    convert(model)
    assert torch.equal(model["a"].weight, first)


def test_the_meta_device_gets_the_shapes_and_a_note():
    with torch.device("meta"):
        model = Net()
    report = convert(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.blocks[0].up_proj.alpha.shape == (32,)
    assert any("meta" in note for note in report.notes)


# --- alpha ---


@pytest.mark.parametrize(
    ("arguments", "up", "down"),
    [
        ({}, 1.0, 1 / 2),
        ({"n_layers": 25}, 1.0, 1 / 5),
        ({"alpha_init": 0.75, "output_alpha_init": 0.125}, 0.75, 0.125),
        ({"output_alpha_init": "1/sqrt(2L)"}, 1.0, 8**-0.5),
        ({"output": "up_proj"}, 1 / 2, 1.0),
        ({"output": ["*.0.up_proj", "*.1.*"]}, 1 / 2, 1.0),
    ],
)
def test_alpha_of_outputs_and_others(arguments, up, down):
    model = Net(4)
    report = convert(model, **arguments)
    block = model.blocks[0]
    assert torch.equal(block.up_proj.alpha, torch.full((32,), up))
    assert torch.equal(block.down_proj.alpha, torch.full((16,), down))
    assert block.down_proj.alpha_init == down  # what reset_parameters returns to
    assert report.n_layers == arguments.get("n_layers", 4)
    assert {layer.name: layer.alpha_init for layer in report.converted}["blocks.0.up_proj"] == up


def test_blocks_are_the_longest_outermost_list_of_one_type():
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Block(4, 4) for _ in range(9))
            self.o_proj = nn.Linear(4, 4)

    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleList(Moe() for _ in range(2)),
            "decoder": nn.Sequential(nn.Sequential(nn.Linear(4, 4)), *(Moe() for _ in range(3))),
            "mlp": nn.Sequential(*(nn.Linear(4, 4) for _ in range(7))),
            "norms": nn.ModuleList(nn.RMSNorm(4) for _ in range(8)),
        }
    )
    assert convert(model).n_layers == 3


def test_without_blocks_l_is_one_and_a_note_says_so():
    model = nn.ModuleDict({"o_proj": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})
    report = convert(model)
    assert report.n_layers == 1
    assert len(report.notes) == 1
    assert "give n_layers" in report.notes[0]
    assert convert(nn.ModuleDict({"o_proj": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)}), n_layers=3).notes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "calibrate"}, r"mode='calibrate' needs batches"),
        ({"mode": "observe"}, r"mode='observe' needs batches"),
        ({"alpha_init": "1/L"}, r"alpha_init='1/L' is not a named scale.*1/sqrt\(L\)"),
        ({"output_alpha_init": "two"}, r"output_alpha_init='two'"),
        ({"n_layers": 0}, r"n_layers=0: give the number of blocks"),
        ({"output": "wo"}, r"output='wo' fits no nn.Linear"),
        ({"include": "up"}, r"include='up' fits no nn.Linear.*nearest: up_proj"),
        ({"include": "proj"}, r"include='proj' fits no nn.Linear"),
        ({"include": "zz"}, r"nearest: down_proj, lm_head, up_proj\)"),
        ({"exclude": ["up_proj", "blok.*"]}, r"exclude='blok\.\*' fits no nn.Linear"),
        ({"exclude": "*"}, r"nothing to convert in this Net: 9 x excluded"),
    ],
)
def test_a_mistake_says_so_and_changes_nothing(arguments, message):
    model = Net()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        convert(model, **arguments)
    assert not any(isinstance(module, SDDLinear) for module in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- what it does ---


def test_transformer_encoder_computes_the_same_in_evaluation():
    # torch's fused inference path would read V as a plain weight
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    report = convert(model)
    assert [converted.name.split(".")[-1] for converted in report.converted] == ["linear1", "linear2"] * 2
    assert [converted.is_output for converted in report.converted] == [False, True] * 2
    assert any("MultiheadAttention" in note for note in report.notes)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model.train()(x, src_key_padding_mask=padding).detach()
    model.eval()
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        alone = model.layers[0](x)
    torch.testing.assert_close(y[~padding], expected[~padding])
    torch.testing.assert_close(alone, model.train().layers[0](x))


def test_the_scale_of_v_is_not_seen():
    model = Net().double()
    convert(model, eps=1e-20)
    tokens = torch.arange(11)
    before = model(tokens)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SDDLinear):
                module.weight.mul_(torch.rand(()).item() * 5 + 0.1)
    torch.testing.assert_close(model(tokens), before)


def test_a_converted_model_learns():
    torch.manual_seed(0)
    model = Net()
    convert(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(11)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(tokens), (3 * tokens + 1) % 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert (model.blocks[0].up_proj.alpha != 1).any()
