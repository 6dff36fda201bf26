"""Calibration: closed form, synchronised passes, bits kept, and what it refuses."""

import pytest
import torch
from torch import nn

from sdd import SDDLinear, convert
from sdd.conversion.calibrate import Norms, closed_form, fit_alphas
from sdd.errors import UserError
from sdd.functional import scaled_norm
from sdd.norm_groups import resolve_group


class Residual(nn.Module):
    """Two blocks `x + down(relu(up(x)))`, which are called in another order than they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(8, 12, bias=False) for _ in range(2))

    def forward(self, x, scale: float = 1.0):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + scale * down(up(x).relu())
        return x


def draw(seed: int, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def trained(seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    return Residual()


@pytest.mark.parametrize("seed", range(3))
def test_alpha_is_the_weighted_least_squares_solution(seed):
    z, u = draw(seed, 40, 12) * draw(seed + 9, 40, 1).exp(), draw(seed + 20, 40, 12)
    for group, shared in ((None, False), (4, False), (4, True), ([(8, 4), (4, 0)], False)):
        norms = Norms(resolve_group(group, 12), 1e-6, shared)
        alpha = closed_form([(z[:25], u[:25]), (z[25:], u[25:])], norms, "layer").requires_grad_()
        width = 12 if group is None else 4
        weight = 1 / u.unflatten(-1, (-1, width)).square().mean(-1, keepdim=True)
        y = scaled_norm(z, alpha, group=norms.parts)
        loss = (weight * (y - u).unflatten(-1, (-1, width)).square()).sum()
        (gradient,) = torch.autograd.grad(loss, alpha)
        assert gradient.abs().max() < 1e-3 * loss


def test_tokens_of_one_scale_are_calibrated_without_error():
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    x = draw(1, 50, 16)
    with torch.no_grad():
        x = x / (x @ layer.weight.T).square().mean(-1, keepdim=True).sqrt()
    model = nn.Sequential(layer)
    expected = model(x)
    report = convert(model, mode="calibrate", batches=[x], eps=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert report.converted[0].calibration.error < 1e-4


def test_weights_and_biases_keep_their_bits():
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convert(model, mode="calibrate", batches=[draw(0, 5, 8)])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(isinstance(layer, SDDLinear) for layer in [*model.up, *model.down])


@pytest.mark.parametrize("seed", range(3))
def test_inputs_are_those_of_the_converted_prefix_and_targets_the_originals(seed):
    """Layer by layer, by hand, on both batches: the passes in lockstep give the same alphas."""
    model, batches = trained(seed), [draw(seed, 7, 8), draw(seed + 1, 5, 8)]
    norms = {name: Norms(resolve_group(None, layer.out_features)) for name, layer in linears(model).items()}
    fits = fit_alphas(model, linears(model), norms, batches)
    original, converted = torch.cat(batches), torch.cat(batches)
    hidden = hidden_true = torch.empty(0)
    for index in range(2):
        for name in (f"up.{index}", f"down.{index}"):
            layer = model.get_submodule(name)
            if name.startswith("up"):
                x, x_true = converted, original
            else:
                x, x_true = hidden.relu(), hidden_true.relu()
            z, u = x @ layer.weight.T, x_true @ layer.weight.T
            alpha = closed_form([(z, u)], norms[name], name).float()
            torch.testing.assert_close(fits[name].alpha, alpha, rtol=1e-4, atol=1e-5)
            bias = 0 if layer.bias is None else layer.bias
            hidden, hidden_true = scaled_norm(z, alpha) + bias, u + bias
        original, converted = original + hidden_true, converted + hidden


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def test_the_report_gives_the_error_of_the_model_itself():
    model, x = trained(), draw(3, 64, 8)
    seen: dict[str, torch.Tensor] = {}
    for name, layer in linears(model).items():

        def keep(layer, _, y, name=name):
            seen[name] = y.detach() - (0 if layer.bias is None else layer.bias.detach())

        layer.register_forward_hook(keep)
    model(x)
    original = dict(seen)
    report = convert(model, mode="calibrate", batches=[x])
    model(x)
    for layer in report.converted:
        error = (seen[layer.name] - original[layer.name]).norm(dim=-1) / original[layer.name].norm(dim=-1)
        assert layer.calibration.error == pytest.approx(error.median().item(), rel=1e-3)


def test_a_sink_token_does_not_decide_for_the_others():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16, bias=False)), draw(0, 512, 16)
    x[:4] *= 1000
    report = convert(model, mode="calibrate", batches=[x])
    assert report.converted[0].calibration.error < 0.3
    assert report.converted[0].calibration.outliers == 4
    assert any("over 10 times the usual scale" in note for note in report.notes)


def test_a_layer_above_max_error_stays_and_later_ones_see_its_true_outputs():
    x, limit = draw(3, 64, 8), 0.3
    assert {layer.name for layer in convert(trained(), mode="calibrate", batches=[x]).converted} > {"up.1"}
    model = trained()
    report = convert(model, mode="calibrate", batches=[x], max_error=limit)
    stayed = [layer for layer in report.kept if "max_error" in layer.reason]
    assert stayed
    assert report.converted
    assert all(layer.calibration.error <= limit for layer in report.converted)
    assert all(isinstance(model.get_submodule(layer.name), nn.Linear) for layer in stayed)
    assert [layer.name for layer in report.converted] == ["up.1"]
    assert report.converted[0].calibration.inherited == 0


def test_padding_does_not_count():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(10, 8), nn.Linear(8, 6)

        def forward(self, input_ids, attention_mask=None):
            return self.body(self.embed(input_ids))

    torch.manual_seed(0)
    alphas = []
    for padding in (0, 9):
        torch.manual_seed(0)
        model = Embedded()
        ids = torch.tensor([[1, 2, 3, padding, padding], [4, 5, 6, 7, padding]])
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
        report = convert(model, mode="calibrate", batches=[{"input_ids": ids, "attention_mask": mask}])
        assert report.converted[0].calibration.tokens == 7
        alphas.append(model.body.alpha.detach())
    assert torch.equal(*alphas)


def test_mode_and_generators_are_put_back_and_dropout_is_off():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    model[1].eval()
    state = torch.get_rng_state()
    convert(model, mode="calibrate", batches=[draw(0, 4, 8)])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, False, True]
    model(draw(0, 4, 8))  # the first pass names layers that it does not call
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_no_batch_reaches_stay():
    class Unused(Residual):
        def __init__(self):
            super().__init__()
            self.aside = nn.Linear(8, 8)

    model = Unused()
    report = convert(model, mode="calibrate", batches=[draw(0, 4, 8)])
    assert {layer.name: layer.reason for layer in report.kept} == {"aside": "the batches do not reach it"}


def test_batches_that_take_other_paths_are_calibrated_together():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.last = nn.Linear(8, 8)

        def forward(self, x, expert):
            return self.last(self.experts[expert](x))

    torch.manual_seed(0)
    report = convert(Routed(), mode="calibrate", batches=[(draw(i, 4, 8), i % 2) for i in range(4)])
    tokens = {layer.name: layer.calibration.tokens for layer in report.converted}
    assert tokens == {"experts.0": 8, "experts.1": 8, "last": 16}


@pytest.mark.parametrize(
    "batch", [draw(0, 4, 8), draw(0, 8), draw(0, 2, 3, 8), (draw(0, 4, 8), 0.5), {"x": draw(0, 4, 8), "scale": 0.5}]
)
def test_examples_are_tensors_tuples_or_mappings(batch):
    assert len(convert(trained(), mode="calibrate", batches=iter([batch, batch])).converted) == 4


def refused(model: nn.Module, error: type[Exception], match: str, **arguments) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(error, match=match) as caught:
        convert(model, **arguments)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_mistakes_are_one_clear_line_and_the_model_is_unchanged():
    x = draw(0, 4, 8)
    refused(trained(), ValueError, "needs batches", mode="calibrate")
    refused(trained(), ValueError, "did you mean mode='calibrate'", batches=[x])
    refused(trained(), ValueError, "choose one of 'reinit', 'calibrate', 'observe'", mode="fit", batches=[x])
    refused(trained(), ValueError, "max_error=0 must be above 0", mode="calibrate", batches=[x], max_error=0)
    refused(trained(), ValueError, "max_error=1 is for mode='calibrate'", mode="observe", batches=[x], max_error=1)
    refused(trained(), ValueError, "the least error is", mode="calibrate", batches=[x], max_error=1e-6)
    refused(trained(), UserError, r"give a list of examples, as in batches=\[batch\]", mode="calibrate", batches=x)
    refused(trained(), UserError, "batches is empty", mode="calibrate", batches=[])
    refused(trained(), UserError, r"refused batches\[1\] \(RuntimeError", mode="calibrate", batches=[x, x[:, :5]])
    refused(trained(), UserError, "not finite", mode="calibrate", batches=[x, x * float("nan")])
    refused(trained().to("meta"), ValueError, "load the weights first", mode="calibrate", batches=[x])
    refused(trained(), ValueError, "group='gate' fits no", mode="calibrate", batches=[x], group={"gate": 4})
    refused(
        trained(),
        ValueError,
        "group=5 of up.0: group=5 does not divide",
        mode="calibrate",
        batches=[x],
        group={"up.*": 5},
    )


def test_an_optimiser_goes_on_with_its_state_and_takes_the_alphas():
    """The recipe of docs/calibrate.md."""
    model, x = trained(), draw(0, 32, 8)
    target = trained(1)(x).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    train(3)
    moments = {parameter: optimizer.state[parameter]["exp_avg"].clone() for parameter in model.parameters()}
    report = convert(model, mode="calibrate", batches=[x])
    alphas = [model.get_parameter(layer.alpha_name) for layer in report.converted]
    optimizer.add_param_group({"params": alphas, "weight_decay": 0.0})
    assert all(torch.equal(optimizer.state[parameter]["exp_avg"], old) for parameter, old in moments.items())
    assert {id(p) for p in moments} | {id(p) for p in alphas} == {id(p) for p in model.parameters()}
    losses = train(20)
    assert losses[-1] < 0.7 * losses[0]


# --- observe


def test_observing_changes_nothing_and_tells_scale_spread_sinks_and_error():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16, bias=False)), draw(0, 200, 16)
    x = x / (x @ model[0].weight.detach().T).square().mean(-1, keepdim=True).sqrt()
    x[:100] *= 2
    x[:3] *= 100
    x[-2:] /= 100
    before = model[0].weight.clone()
    report = convert(model, mode="observe", batches=[x])
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, before)
    (layer,) = report.observed
    assert (layer.tokens, layer.sinks, layer.faint) == (200, 3, 2)
    assert layer.spread == pytest.approx(2, rel=1e-3)
    assert not report.converted
    predicted = convert(model, mode="calibrate", batches=[x]).converted[0].calibration.error
    assert layer.error == pytest.approx(predicted, rel=1e-4)
    assert "1 layers observed" in str(report)
