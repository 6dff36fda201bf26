"""Conv1D, subclasses of nn.Linear and stacked experts: described, saved, loaded, calibrated and reverted."""

import pytest
import torch
from helpers_tiny import TINY, TOKENS, build, output, trained

from sdd import apply, convert, revert
from sdd.conversion import load_converted
from sdd.conversion.description import describe
from sdd.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")


def gpt2(**changes):
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **changes
    )
    return transformers.GPT2LMHeadModel(config).eval()


def gpt_oss():
    sizes = {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "pad_token_id": 0}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, eos_token_id=0)).eval()


def falcon():
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def mixtral():
    return build("Mixtral", num_local_experts=4)


OTHERS = {"gpt2": "Conv1D", "falcon": "FalconLinear", "mixtral": "MixtralExperts", "gpt_oss": "GptOssExperts"}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_and_experts_are_described_and_loaded_with_all_settings(name, tmp_path):
    import sdd.interop.converted  # noqa: F401

    make = globals()[name]
    model = make()
    report = convert(model, eps=1e-3, alpha_init=0.5, example={"input_ids": TOKENS})
    assert OTHERS[name] in {layer.kind for layer in report.converted}
    assert not report.proof.named("refuted")
    trained(model).save_pretrained(tmp_path)
    fresh = make()
    apply(fresh, report.to_json())
    assert str(fresh) == str(model)
    load_converted(fresh, model.state_dict())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(output(fresh), output(model))
    assert torch.equal(output(loaded), output(model))
    assert settings(loaded) == settings(model) == settings(fresh)
    assert {p.dtype for key, p in half.named_parameters() if key.endswith("alpha")} == {torch.float32}


def settings(model) -> dict[str, object]:
    return {
        layer["name"]: (layer["eps"], layer["alpha_init"], layer.get("group"), layer["kind"])
        for layer in describe(model)["layers"]
    }


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_calibrated_and_reverted_bit_for_bit(name):
    model = globals()[name]()
    before, kinds = output(model), [type(module) for module in model.modules()]
    names = [set(vars(module)) for module in model.modules()]
    report = convert(model, mode="calibrate", batches=[{"input_ids": TOKENS}], example={"input_ids": TOKENS})
    assert report.proof.named("proven").keys() == {layer.module_name for layer in report.converted}
    assert OTHERS[name] in {layer.kind for layer in report.converted}
    revert(model)
    assert torch.equal(output(model), before)
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == names


def test_redrawn_experts_need_batches_and_without_them_the_model_is_unchanged():
    model = mixtral()
    convert(model)
    before, shown = output(model), str(model)
    with pytest.raises(UserError, match="were trained since calibration or drawn anew") as caught:
        revert(model)
    assert "\n" not in str(caught.value)
    assert str(model) == shown
    assert torch.equal(output(model), before)
