"""LoRA on SDD layers: what PEFT checks of its own layers (tests/test_custom_models.py there), and the norm's place."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft", reason="the extra peft is not installed")

import peft
from hypothesis import given, settings
from hypothesis import strategies as st

import sdd.interop.peft as sdd_peft
from sdd import SDDLinear, revert
from sdd.conversion.kinds import SDDConv1D
from sdd.errors import UserError
from sdd.functional import sdd_linear
from sdd.nn import SDDExpertLinear

pytestmark = pytest.mark.ties

SEEDS = st.integers(0, 2**31)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "heads": {"group": 4},
    "shared alpha": {"group": 4, "shared_alpha": True},
    "parts": {"group": [(8, 4), (4, 0)]},
    "eps": {"eps": 0.1},
}
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4},
    "alpha": {"modules_to_save": ["alpha"]},
    "patterns": {"rank_pattern": {"first": 3}, "alpha_pattern": {"second": 5}},
}


def conv1d(*features: int, **options: Any) -> SDDConv1D:
    layer: Any = SDDLinear(*features, **options)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    layer.__class__ = SDDConv1D
    return layer


class MLP(nn.Module):
    def __init__(self, make: Any = SDDLinear, **options: Any) -> None:
        super().__init__()
        self.first = make(6, 12, **options)
        self.second = make(12, 12, **options)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


@torch.no_grad()
def drawn(model: nn.Module, seed: int) -> Any:
    """Every parameter drawn, so that a misplaced one shows; alpha around one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + values / 3 if name.rsplit(".", 1)[-1] == "alpha" else values / parameter.shape[-1] ** 0.5)
    return model


def base_model(seed: int = 0, make: Any = SDDLinear, **options: Any) -> Any:
    return drawn(MLP(make, **options).double(), seed).eval()


def config(**changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"], **changes})


def redraw_adapters(model: nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return model


def adapted(base: nn.Module, seed: int = 1, **changes: Any) -> Any:
    return redraw_adapters(peft.get_peft_model(base, config(**changes)), seed).eval()


def inputs(seed: int = 2, rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_equation(layer: Any, x: Tensor, adapters: list[str]) -> Tensor:
    """`alpha * norm((V + sum of s B A) x) + b`, written out."""
    base = layer.get_base_layer()
    weight, alpha = base.matrix, base.alpha
    for name in adapters:
        weight = weight + layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
        alpha = alpha + layer.lora_scale[name] if name in layer.lora_scale else alpha
    return sdd_linear(x, weight, alpha, base.bias, group=base.parts, eps=base.eps)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@settings(max_examples=10)
@given(lora=st.sampled_from(list(LORA)), make=st.sampled_from([SDDLinear, conv1d]), seed=SEEDS)
def test_the_product_goes_under_the_norm(options: dict[str, Any], lora: str, make: Any, seed: int) -> None:
    model = adapted(base_model(seed, make, **options), seed + 1, **LORA[lora])
    x, first = inputs(seed), model.base_model.model.first
    assert same(first(x), by_equation(first, x, ["default"]))


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
@settings(max_examples=10)
@given(
    options=st.sampled_from(list(OPTIONS)), make=st.sampled_from([SDDLinear, conv1d]), safe=st.booleans(), seed=SEEDS
)
def test_merging_keeps_the_outputs(lora: dict[str, Any], options: str, make: Any, safe: bool, seed: int) -> None:
    base, x = base_model(seed, make, **OPTIONS[options]), inputs(seed)
    before, names = base(x), dict(base.named_modules()).keys()
    model = adapted(base, seed + 1, **lora)
    y = model(x)
    assert not torch.allclose(y, before, rtol=1e-3)
    model.merge_adapter(safe_merge=safe)
    assert same(model(x), y)
    model.unmerge_adapter()
    assert same(model(x), y)
    with model.disable_adapter():
        assert same(model(x), before)
    merged = model.merge_and_unload(safe_merge=safe)
    assert same(merged(x), y)
    assert dict(merged.named_modules()).keys() == names


@given(seed=SEEDS)
@settings(max_examples=10)
def test_adapters_are_set_combined_and_deleted(seed: int) -> None:
    x, base = inputs(seed), base_model(seed)
    before = base(x)
    model = peft.get_peft_model(base, config(modules_to_save=["alpha"]))
    model.add_adapter("other", config(r=3))
    redraw_adapters(model, seed).eval()
    one = model(x)
    model.set_adapter("other")
    other = model(x)
    assert not torch.allclose(one, other, rtol=1e-3)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    first = model.base_model.model.first
    assert same(first(x), by_equation(first, x, ["default", "other"]))
    model.merge_adapter()
    assert same(model(x), both)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["other"])
    assert same(model(x), other)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert same(model(x), before)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert same(model(x), one)
    assert same(model.unload()(x), before)


def test_a_new_adapter_changes_nothing_and_trains_nothing_else() -> None:
    x, base = inputs(), base_model()
    y = base(x)
    model = peft.get_peft_model(base, config(modules_to_save=["alpha"], lora_dropout=0.5)).train()
    assert torch.equal(model(x), y)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[-2] for name in frozen} == {"base_layer", "head"}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name or "lora_scale" in name)


def test_dropout_acts_on_the_adapter_alone() -> None:
    x, model = inputs(), adapted(base_model(), lora_dropout=0.5)
    evaluated = model(x)
    assert torch.equal(model(x), evaluated)
    model.train()
    assert not torch.allclose(model(x), evaluated)
    with model.disable_adapter():
        assert torch.equal(model(x), base_model()(x))


def test_the_scaling_of_an_adapter_can_be_changed() -> None:
    x, model = inputs(), adapted(base_model())
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.set_scale("default", 0.5)
    first = model.base_model.model.first
    assert first.scaling["default"] == 0.5 * 3 / 2
    assert same(first(x), by_equation(first, x, ["default"]))


def test_rows_may_have_adapters_of_their_own() -> None:
    x, base = inputs(rows=6), base_model()
    rows = ["default", "__base__", "other", "other", "__base__", "default"]
    model = peft.get_peft_model(base, config())
    model.add_adapter("other", config(r=3))
    redraw_adapters(model, 1).eval()
    expected = torch.empty(6, 3, dtype=torch.float64)
    for name in ("default", "other"):
        model.set_adapter(name)
        chosen = [i for i, row in enumerate(rows) if row == name]
        expected[chosen] = model(x[chosen])
    with model.disable_adapter():
        expected[[1, 4]] = model(x[[1, 4]])
    assert same(model(x, adapter_names=rows), expected)


def test_a_row_cannot_have_an_alpha_of_its_own() -> None:
    model = adapted(base_model(), modules_to_save=["alpha"])
    with pytest.raises(UserError, match="'default' trains alpha, which cannot differ by row"):
        model(inputs(rows=1), adapter_names=["default"])


def test_weighted_adapters_add_up_under_the_norm() -> None:
    x = inputs()
    model = peft.get_peft_model(base_model(), config())
    model.add_adapter("other", config())
    redraw_adapters(model, 1).eval()
    first = model.base_model.model.first
    half = [first.get_delta_weight(name) / 2 for name in ("default", "other")]
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean", combination_type="cat")
    model.set_adapter("mean")
    base = first.get_base_layer()
    assert same(first(x), sdd_linear(x, base.weight + sum(half), base.alpha, base.bias))


@pytest.mark.parametrize("broken", ["lora_A", "lora_scale"])
def test_a_safe_merge_refuses_what_is_not_finite(broken: str) -> None:
    model = adapted(base_model(), modules_to_save=["alpha"])
    weights = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    layer = model.base_model.model.first
    with torch.no_grad():
        (layer.lora_A["default"].weight if broken == "lora_A" else layer.lora_scale["default"])[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in weights.items())


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_4"])
@pytest.mark.parametrize("make", [SDDLinear, conv1d])
def test_initialisations_from_the_weight_leave_the_function(make: Any, init: str) -> None:
    x, base = inputs(dtype=torch.float32), base_model(make=make).float()
    y = base(x)
    model = peft.get_peft_model(base, config(init_lora_weights=init)).eval()
    assert torch.allclose(model(x), y, rtol=1e-4, atol=1e-5)
    assert not any(torch.equal(b, torch.zeros_like(b)) for n, b in model.named_parameters() if "lora_A" in n)


def test_half_precision_sums_in_float32_and_keeps_alpha_wide() -> None:
    x = inputs(dtype=torch.bfloat16)
    model = adapted(base_model().bfloat16(), modules_to_save=["alpha"])
    first = model.base_model.model.first
    assert first.lora_A["default"].weight.dtype == first.lora_scale["default"].dtype == torch.float32
    y = first(x)
    assert y.dtype == torch.bfloat16
    assert first.get_base_layer().alpha.dtype == torch.float32
    exact = by_equation(copy.deepcopy(first).double(), x.double(), ["default"])
    assert (y - exact).abs().max() < 0.03 * exact.abs().max()


def test_casting_an_adapted_model_keeps_alpha_and_its_shift() -> None:
    model = adapted(base_model().float(), modules_to_save=["alpha"])
    wide = {name: value.clone() for name, value in model.named_parameters() if "scale" in name or "alpha" in name}
    model.half()
    cast = dict(model.named_parameters())
    assert len(wide) == 4
    assert all(torch.equal(cast[name], value) for name, value in wide.items())
    assert {value.dtype for name, value in cast.items() if name not in wide} == {torch.float16}


def test_an_adapted_model_is_not_reverted() -> None:
    model = adapted(base_model())
    with pytest.raises(UserError, match="is an adapter over an SDD layer: merge it first"):
        revert(model, [inputs()])
    model(inputs())


def test_hooks_of_the_layer_still_see_its_calls() -> None:
    base, seen = base_model(), []
    base.first.register_forward_hook(lambda module, args, y: seen.append(y))
    model = adapted(base)
    y = model.base_model.model.first(inputs())
    assert torch.equal(seen[0], y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoraLinearVariant is not for SDD layers, which take plain LoRA"),
        ({"lora_bias": True}, "lora_bias=True would add a bias under the norm"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' is not for SDD layers; choose one of True, False"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not"),  # in PEFT it ignores how Conv1D lies
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights='loftq' is not"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what PEFT itself says of these settings
def test_what_is_not_plain_lora_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft.get_peft_model(base_model(bias=False), config(**changes))


@pytest.mark.parametrize("method", ["IA3Config", "LoHaConfig", "VeraConfig", "OFTConfig"])
def test_other_methods_of_peft_refuse_sdd_layers_themselves(method: str) -> None:
    options: dict[str, Any] = {"feedforward_modules": []} if method == "IA3Config" else {}
    with pytest.raises((ValueError, TypeError), match=r"SDDLinear|not supported|No layers types compatible"):
        peft.get_peft_model(base_model(), getattr(peft, method)(target_modules=["first"], **options))


def test_targets_are_the_sdd_layers_before_and_after_adapting() -> None:
    model = base_model()
    assert sdd_peft.targets(model) == ["first", "second"]
    model = peft.get_peft_model(model, config(target_modules=["first"]))
    assert sdd_peft.targets(model) == ["first", "second"]
    with pytest.raises(UserError, match="this Linear has no SDD layer that LoRA fits: convert it first"):
        sdd_peft.targets(nn.Linear(2, 2))


@pytest.mark.parametrize("method", ["LoraConfig", "LoHaConfig"])
def test_all_linear_says_what_it_passes_by(method: str) -> None:
    with pytest.warns(UserWarning, match="passes by 2 SDD layers, such as first: LoRA takes target_modules=sdd"):
        model = peft.get_peft_model(base_model(), getattr(peft, method)(target_modules="all-linear"))
    assert type(model.base_model.model.first) is SDDLinear


def test_all_linear_is_quiet_where_it_passes_nothing_by() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules="all-linear"))


def test_the_experts_of_our_models_are_refused() -> None:
    model = nn.ModuleDict({"experts": SDDExpertLinear(2, 4, 4)})
    with pytest.raises(UserError, match="cannot adapt a SDDExpertLinear, the experts of a LanguageModel"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["experts"]))


def test_a_weight_may_be_named_as_a_parameter() -> None:
    x, base = inputs(), base_model()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_parameters=["first.weight"]))
    model = redraw_adapters(model, 1).eval()
    layer = model.base_model.model.first
    y, base = layer(x), layer.get_base_layer()
    weight = base.weight + layer.get_delta_weight("default")
    assert same(y, sdd_linear(x, weight, base.alpha, base.bias))
    expected = model(x)
    assert same(model.merge_and_unload()(x), expected)
