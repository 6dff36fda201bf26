"""Gate and up under one norm: hooks see them, and what cannot stand in their place is refused."""

from typing import Any

import pytest
import torch
from helpers_models import drawn_tokens, tiny_model
from torch import Tensor, nn

from sdd.errors import UserError
from sdd.models import LanguageModel, MoEConfig
from sdd.nn import SDDExpertLinear, SDDLinear

every_kind = pytest.mark.parametrize("moe", [None, MoEConfig(4, 2)], ids=["dense", "experts"])
every_name = pytest.mark.parametrize("name", ["gate_proj", "up_proj"])


def released(moe: MoEConfig | None) -> tuple[LanguageModel, Any, Tensor]:
    """A model of the released placement, the feed-forward network of its middle block, and tokens."""
    model = tiny_model("sdd-released", dtype=torch.float64, moe=moe)
    return model, model.blocks[1].ffn, drawn_tokens(model.config)


class Adapted(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Tensor:
        return self.layer(*inputs)


class OwnForward(SDDLinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnExpertForward(SDDExpertLinear):
    def forward(self, x_MI: Tensor, order: Any) -> Tensor:
        return 2 * super().forward(x_MI, order)


def wrap(ffn: Any, name: str) -> None:
    setattr(ffn, name, Adapted(getattr(ffn, name)))


def derive(ffn: Any, name: str) -> None:
    layer: Any = getattr(ffn, name)
    layer.__class__ = OwnForward if isinstance(layer, SDDLinear) else OwnExpertForward


def set_forward(ffn: Any, name: str) -> None:
    layer = getattr(ffn, name)
    layer.forward = lambda *inputs: 2 * type(layer).forward(layer, *inputs)


@every_kind
@every_name
@pytest.mark.parametrize("change", [wrap, derive, set_forward])
def test_an_adapter_under_a_joint_norm_is_refused(change: Any, name: str, moe: MoEConfig | None):
    model, ffn, tokens = released(moe)
    change(ffn, name)
    with pytest.raises(UserError, match=f"{name} is a .*norms gate and up together.*Adapt other projections"):
        model(tokens)


@every_kind
@every_name
def test_every_hook_of_a_joint_projection_runs(name: str, moe: MoEConfig | None):
    model, ffn, tokens = released(moe)
    expected = model(tokens)
    layer, seen = getattr(ffn, name), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(("before", args[0].shape)))
    layer.register_forward_hook(lambda module, args, output: seen.append(("after", output.shape)))
    layer.register_full_backward_hook(lambda module, before, after: seen.append(("back", after[0].shape)))
    logits = model(tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    logits.sum().backward()
    width = model.config.d_ff
    assert [what for what, _ in seen] == ["before", "after", "back"]
    assert [shape[-1] for _, shape in seen] == [model.config.d_model, width, width]
    assert "forward" not in vars(layer)


@every_kind
@every_name
def test_what_a_hook_returns_counts(name: str, moe: MoEConfig | None):
    """A hook that doubles the output does what doubled alphas do."""
    model, ffn, tokens = released(moe)
    layer = getattr(ffn, name)
    handle = layer.register_forward_hook(lambda module, args, output: 2 * output)
    hooked = model(tokens)
    handle.remove()
    assert not torch.allclose(model(tokens), hooked)
    with torch.no_grad():
        layer.alpha *= 2
    torch.testing.assert_close(model(tokens), hooked)


@every_kind
def test_a_hook_may_change_the_input_of_one_projection(moe: MoEConfig | None):
    """Both share the norm: without the input of up, its output is zero and gate's norm is that of its own half."""
    model, ffn, tokens = released(moe)
    hook = ffn.up_proj.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]), *args[1:]))
    hooked = model(tokens)
    hook.remove()
    with torch.no_grad():
        ffn.up_proj.weight.zero_()
    torch.testing.assert_close(model(tokens), hooked)
