"""SDDLinear in the place of nn.Linear, and RMSNorm."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdd import SDDLinear
from sdd.conversion import convert
from sdd.functional import norm, sdd_linear
from sdd.nn import RMSNorm, SDDExpertLinear

GROUPS = [None, 4, ((8, 4), (4, 0))]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def round_trip(module: nn.Module) -> dict[str, Tensor]:
    """The state dict after torch.save and a safe torch.load."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- construction ---


def test_has_the_signature_and_attributes_of_a_linear():
    layer = SDDLinear(5, 12, False, "cpu", torch.float64)
    assert (layer.in_features, layer.out_features) == (5, 12)
    assert layer.bias is None
    assert layer.weight.shape == (12, 5)
    assert layer.weight.dtype == layer.alpha.dtype == torch.float64
    assert [name for name, _ in SDDLinear(5, 12).named_parameters()] == ["weight", "bias", "alpha"]


@settings(deadline=None, max_examples=25)
@given(
    group=st.sampled_from(GROUPS),
    shared=st.booleans(),
    bias=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_forward_is_the_function_of_its_parameters(group, shared, bias, eps, dtype):
    layer = SDDLinear(5, 12, bias, dtype=dtype, group=group, shared_alpha=shared, alpha_init=0.5, eps=eps)
    size = {None: 12, 4: 4 if shared else 12}.get(group, 4 if shared else 8)
    assert layer.alpha.shape == (size,)
    assert (layer.alpha == 0.5).all()
    with torch.no_grad():
        layer.alpha.copy_(torch.linspace(-1, 1, size))
    x = randn(2, 3, 5, dtype=dtype)
    expected = sdd_linear(x, layer.weight, layer.alpha, layer.bias, group=group, eps=eps)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alpha_is_float32_in_a_half_precision_layer(dtype):
    layer = SDDLinear(5, 12, dtype=dtype, alpha_init=1 / 3)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.alpha, torch.full((12,), 1 / 3))
    layer(randn(4, 5, dtype=dtype)).float().sum().backward()
    assert layer.alpha.grad.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_draws_what_a_linear_draws_and_leaves_the_generator_where_it_does(bias):
    built = []
    for kind in (nn.Linear, SDDLinear):
        torch.manual_seed(3)
        built.append((kind(7, 12, bias), torch.get_rng_state()))
    (linear, linear_state), (layer, state) = built
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(state, linear_state)
    assert layer.bias is None or torch.equal(layer.bias, linear.bias)


def test_groups_are_resolved_once_and_cannot_be_changed():
    layer = SDDLinear(5, 12, group=[(8, 4), (4, 0)])
    assert layer.group == layer.parts == ((8, 4), (4, 0))
    assert (SDDLinear(5, 12, group=4).group, SDDLinear(5, 12, group=4).parts) == (4, ((12, 4),))
    assert (SDDLinear(5, 12).group, SDDLinear(5, 12).parts) == (None, ((12, 12),))
    with pytest.raises(AttributeError, match="group"):
        layer.group = 4


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (5, r"group=5 does not divide the 12 output features"),
        ([(8, 4)], r"\[\(8, 4\)\] add up to 8, expected the 12"),
        ([(8, 3), (4, 4)], r"part \(8, 3\)"),
    ],
)
def test_a_group_that_does_not_fit_says_so(group, message):
    with pytest.raises(ValueError, match=message):
        SDDLinear(5, 12, group=group)


def test_meta_device_then_materialised():
    layer = SDDLinear(5, 12, device="meta", group=4, shared_alpha=True, alpha_init=0.25)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.empty(3, 5, device="meta")).shape == (3, 12)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert torch.equal(layer.alpha, torch.full((4,), 0.25))
    assert 0 < layer.weight.abs().max() <= 5**-0.5
    assert layer.bias.abs().max() <= 5**-0.5


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(SDDLinear(4, 8)) == "SDDLinear(in_features=4, out_features=8, bias=True, alpha_init=1, eps=1e-06)"
    text = repr(SDDLinear(4, 8, group=[(4, 2), (4, 0)], shared_alpha=True, alpha_init=0.5))
    assert "group=((4, 2), (4, 0)), shared_alpha=True, alpha_init=0.5" in text


# --- code that takes every nn.Linear for a plain matrix ---


def test_is_no_linear():
    assert not isinstance(SDDLinear(5, 12), nn.Linear)
    assert not issubclass(SDDLinear, nn.Linear)


def replaced(model: nn.Module) -> list[str]:
    """Replace the Linears of a model as quantisers, adapters and serving engines do; the names of those replaced."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        plain = nn.Sequential(nn.Linear(linear.in_features, linear.out_features))
        plain[0].weight = linear.weight
        setattr(model.get_submodule(parent), leaf, plain)
    return names


@pytest.mark.parametrize("how", ["built", "converted"])
def test_a_loop_that_replaces_linears_leaves_sdd_layers_and_their_output_alone(how):
    if how == "built":
        model = nn.Sequential(SDDLinear(5, 12), nn.ReLU(), nn.Linear(12, 3, bias=False))
    else:
        model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3, bias=False))
        convert(model, exclude="2")
    x = randn(4, 5)
    y, layer = model(x), model[0]
    assert replaced(model) == ["2"]
    assert model[0] is layer
    with torch.no_grad():
        model[2][0].bias.zero_()
    torch.testing.assert_close(model(x), y)


def test_an_initialiser_of_linears_does_not_draw_it_again():
    layer = SDDLinear(5, 12)
    before = layer.weight.clone()
    layer.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    assert torch.equal(layer.weight, before)


# --- state dicts and copies ---


def test_a_linear_state_dict_loads_strictly_and_keeps_alpha():
    linears = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    layers = nn.Sequential(SDDLinear(4, 6, alpha_init=0.5), nn.ReLU(), SDDLinear(6, 3, bias=False, alpha_init=2.0))
    with torch.no_grad():
        layers[0].alpha[0] = 7.0
    layers.load_state_dict(round_trip(linears), strict=True)
    assert torch.equal(layers[0].weight, linears[0].weight)
    assert torch.equal(layers[0].bias, linears[0].bias)
    assert torch.equal(layers[2].weight, linears[2].weight)
    assert layers[0].alpha.tolist() == [7.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert layers[2].alpha.tolist() == [2.0, 2.0, 2.0]


def test_an_sdd_state_dict_loads_into_a_linear_but_for_alpha():
    layer, linear = SDDLinear(4, 6), nn.Linear(4, 6)
    keys = linear.load_state_dict(round_trip(layer), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], ["alpha"])
    assert torch.equal(linear.weight, layer.weight)
    assert torch.equal(linear.bias, layer.bias)


def test_an_sdd_state_dict_must_hold_alpha():
    layers = nn.Sequential(SDDLinear(4, 6))
    state = round_trip(layers)
    del state["0.alpha"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.alpha"):
        layers.load_state_dict(state)


def test_a_state_dict_without_versions_must_hold_alpha():
    """A dict read from safetensors has none: whose it is cannot be known, so a lost alpha must not pass."""
    layers = nn.Sequential(SDDLinear(4, 6))
    state = dict(layers.state_dict())
    layers.load_state_dict(state)
    del state["0.alpha"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.alpha"):
        layers.load_state_dict(state)


@pytest.mark.parametrize("missing", ["0.weight", "0.bias"])
def test_a_linear_state_dict_must_hold_the_rest(missing):
    state = nn.Sequential(nn.Linear(4, 6)).state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{missing}"):
        nn.Sequential(SDDLinear(4, 6)).load_state_dict(state)


def test_a_state_dict_with_an_alpha_of_another_size_fails():
    with pytest.raises(RuntimeError, match=r"size mismatch for alpha"):
        SDDLinear(4, 6, group=3, shared_alpha=True).load_state_dict(SDDLinear(4, 6).state_dict())


@pytest.mark.parametrize("group", GROUPS)
def test_save_load_and_copy_keep_the_function(group):
    layer = SDDLinear(5, 12, group=group, eps=1e-2)
    with torch.no_grad():
        layer.alpha.uniform_(-1, 1)
    x = randn(3, 5)
    y = layer(x)
    loaded = SDDLinear(5, 12, group=group, eps=1e-2)
    loaded.load_state_dict(round_trip(layer))
    assert torch.equal(loaded(x), y)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    with torch.no_grad():
        layer.alpha.zero_()
        layer.weight.zero_()
    for twin in twins:
        assert torch.equal(twin(x), y)
        assert (twin.group, repr(twin)) == (layer.group, repr(layer))


@pytest.mark.parametrize("group", GROUPS)
def test_a_layer_pickled_before_it_kept_its_parts_is_the_same(group):
    layer = SDDLinear(5, 12, group=group)
    state = vars(copy.deepcopy(layer)).copy()
    state["group"] = state.pop("_group")
    del state["parts"]
    old = SDDLinear.__new__(SDDLinear)
    old.__setstate__(state)
    x = randn(3, 5)
    assert torch.equal(old(x), layer(x))
    assert vars(old).keys() == vars(layer).keys()
    assert repr(old) == repr(layer)


def test_a_norm_pickled_before_it_kept_its_width_and_factor_is_the_same():
    norm = RMSNorm(12, weight_init=2.0)
    state = vars(copy.deepcopy(norm)).copy()
    del state["width"], state["factor"]
    old = RMSNorm.__new__(RMSNorm)
    old.__setstate__(state)
    x = randn(3, 12)
    assert torch.equal(old(x), norm(x))
    assert repr(old) == repr(norm)


def test_a_transformer_layer_with_its_fast_path_off_calls_a_layer_placed_by_hand():
    """The fast path reads `.weight` alone, without asking for a class."""
    block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    block.linear1, block.linear2 = SDDLinear(8, 12), SDDLinear(12, 8)
    x = randn(2, 5, 8)
    expected = block.train()(x)
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            torch.testing.assert_close(block.eval()(x), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


# --- transformations ---


@pytest.mark.parametrize("group", GROUPS)
def test_compiles_to_one_graph_with_the_same_gradients(group):
    layer = SDDLinear(5, 12, group=group)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = randn(2, 3, 5)
    for run in (layer, compiled):
        run(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), layer(x))
    for compiled_parameter, parameter in zip(compiled.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(compiled_parameter.grad, parameter.grad)


def test_exports_with_a_free_number_of_tokens():
    layer = SDDLinear(5, 12, group=4, shared_alpha=True)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(layer, (randn(3, 5),), dynamic_shapes=({0: tokens},), strict=True).module()
    x = randn(9, 5, seed=1)
    torch.testing.assert_close(exported(x), layer(x))


# --- RMSNorm ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rms_norm_is_torchs(dtype):
    module = RMSNorm(8, eps=1e-2)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1, 2, 8))
    x = randn(2, 3, 8, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.rms_norm(x.to(wide), (8,), module.weight.to(wide), eps=1e-2).to(dtype)
    torch.testing.assert_close(module(x), expected)
    assert module(x).dtype == dtype


def test_rms_norm_by_head_and_its_reset():
    module = RMSNorm(8, weight_init=0.5, group=4, eps=1e-2)
    x = randn(3, 8)
    halves = [0.5 * F.rms_norm(half, (4,), eps=1e-2) for half in x.split(4, -1)]
    torch.testing.assert_close(module(x), torch.cat(halves, -1))
    meta = RMSNorm(8, weight_init=0.5, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.equal(meta.weight, torch.full((8,), 0.5))


def test_rms_norm_with_one_scale_for_all_heads():
    shared, full = RMSNorm(4, group=4), RMSNorm(8, group=4)
    with torch.no_grad():
        shared.weight.copy_(torch.linspace(-1, 2, 4))
        full.weight.copy_(shared.weight.repeat(2))
    torch.testing.assert_close(shared(randn(3, 8)), full(randn(3, 8)))


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rms_norm_without_a_scale_is_the_norm_in_the_dtype_of_its_input(dtype, group):
    module = RMSNorm(8, eps=1e-2, group=group, scale=False)
    x = randn(2, 3, 8, dtype=dtype)
    assert module(x).dtype == dtype
    assert torch.equal(module(x), norm(x, 1e-2, group).to(dtype))


def test_rms_norm_without_a_scale_has_no_parameters():
    module = RMSNorm(8, scale=False, device="meta")
    module.reset_parameters()
    assert module.weight is None
    assert module.state_dict() == {}
    assert repr(module) == "RMSNorm(8, scale=False, eps=1e-06)"
    assert repr(RMSNorm(8, 0.5)) == "RMSNorm(8, weight_init=0.5, eps=1e-06)"


@pytest.mark.parametrize(
    "build", [lambda: SDDLinear(6, 4), lambda: SDDLinear(6, 4, scale=False), lambda: SDDExpertLinear(2, 6, 4)]
)
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_cast_of_the_module_leaves_alpha_in_float32(build, cast: str):
    layer = build()
    alpha = layer.alpha
    nn.init.uniform_(alpha.data)
    before = alpha.detach().clone()
    if alpha.requires_grad:
        alpha.grad = torch.rand_like(alpha)
        gradient = alpha.grad.clone()
    getattr(layer, cast)()
    assert layer.weight.dtype in (torch.float16, torch.bfloat16)
    assert layer.alpha.dtype == torch.float32
    assert torch.equal(layer.alpha, before)
    if alpha.requires_grad:
        assert layer.alpha is alpha
        assert torch.equal(alpha.grad, gradient)
    assert layer.double().alpha.dtype == torch.float64
    assert layer.half().float().alpha.dtype == torch.float32
    assert layer.to("meta").alpha.is_meta


@given(
    seed=st.integers(0, 2**31),
    group=st.sampled_from(GROUPS),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_an_adapters_product_is_added_before_the_norm_and_its_alpha_replaces_the_own(seed, group, bias, dtype):
    layer = SDDLinear(5, 12, bias, group=group, eps=1e-3, dtype=dtype)
    x, delta = randn(3, 5, seed=seed, dtype=dtype), randn(12, 5, seed=seed + 1, dtype=dtype)
    alpha = randn(*layer.alpha.shape, seed=seed + 2, dtype=layer.alpha.dtype)
    y = layer(x, F.linear(x, delta), alpha)
    expected = sdd_linear(x.double(), layer.weight.double() + delta.double(), alpha, layer.bias, group=group, eps=1e-3)
    assert y.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(y.double(), expected.double(), rtol=tolerance, atol=tolerance)
