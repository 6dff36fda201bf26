"""Converted models of transformers through save_pretrained and from_pretrained."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

from sdd import SDDLinear, convert, revert
from sdd.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(1, 10)[None]


def build(kind: str = "Llama", head: str = "ForCausalLM", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **changes)
    return getattr(transformers, f"{kind}{head}")(config).eval()


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.5, 1.5)
    return model


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS)[0]


LOAD = """
import sys, torch
{imports}
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 10)[None]).logits, sys.argv[2])
"""


def load_elsewhere(folder, target, imports: str) -> subprocess.CompletedProcess:
    code = LOAD.format(imports=imports)
    return subprocess.run([sys.executable, "-c", code, str(folder), str(target)], capture_output=True, text=True)


def test_a_fresh_process_gives_the_same_logits(tmp_path):
    model = build()
    convert(model, eps=1e-4, group={"q_proj": 4})
    trained(model).save_pretrained(tmp_path)
    done = load_elsewhere(tmp_path, tmp_path / "logits", "import sdd.interop.converted")
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits"), output(model))


def test_without_sdd_the_folder_is_refused(tmp_path):
    model = build()
    convert(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sdd-llama"
    done = load_elsewhere(tmp_path, tmp_path / "logits", "")
    assert done.returncode != 0
    assert "sdd-llama" in done.stderr


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_go_both_ways(kind, tied, tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = build(kind, tie_word_embeddings=tied)
    convert(model)
    expected = output(trained(model))
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / turn).eval()
        assert type(model).__name__ == f"SDD{kind}ForCausalLM"
        assert isinstance(model.model.layers[0].self_attn.q_proj, SDDLinear)
        assert torch.equal(output(model), expected)


def kinds():
    encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vit = transformers.ViTConfig(**encoder, image_size=16, patch_size=8)
    t5 = transformers.T5Config(
        vocab_size=32, d_model=16, d_ff=32, d_kv=4, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return {
        "vit": (
            transformers.ViTForImageClassification(vit),
            "ImageClassification",
            {"pixel_values": torch.ones(1, 3, 16, 16)},
        ),
        "t5": (transformers.T5ForConditionalGeneration(t5), "Seq2SeqLM", {"input_ids": TOKENS, "labels": TOKENS}),
    }


@pytest.mark.parametrize("kind", ["vit", "t5"])
def test_other_kinds_are_saved_and_loaded_alike(kind, tmp_path):
    import sdd.interop.converted  # noqa: F401

    model, auto, example = kinds()[kind]
    convert(model.eval())
    trained(model).save_pretrained(tmp_path)
    loaded = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path).eval()
    assert loaded.config.model_type == f"sdd-{kind}"
    with torch.no_grad():
        assert torch.equal(loaded(**example).logits, model(**example).logits)


def test_a_checkpoint_of_transformers_is_calibrated_saved_loaded_and_reverted(tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = build()
    model.save_pretrained(tmp_path / "plain")
    before = output(model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    convert(model, mode="calibrate", batches=[{"input_ids": TOKENS}])
    model.save_pretrained(tmp_path / "sdd")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sdd").eval()
    revert(loaded)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(output(loaded), before)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llama"
    assert torch.equal(output(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")), before)


def test_a_half_precision_load_keeps_alpha_in_float32(tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = build()
    convert(model)
    trained(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    q_proj = loaded.model.layers[0].self_attn.q_proj
    assert q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(q_proj.alpha, model.model.layers[0].self_attn.q_proj.alpha)


def test_with_and_without_a_head(tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = build()
    convert(model)
    trained(model).save_pretrained(tmp_path / "head")
    body = transformers.AutoModel.from_pretrained(tmp_path / "head").eval()
    assert torch.equal(output(body), output(model.model))
    body.save_pretrained(tmp_path / "body")
    head = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "body").eval()
    assert torch.equal(output(head.model), output(body))


def test_a_state_without_alphas_is_one_line(tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = build()
    plain = model.state_dict()
    convert(model)
    model.save_pretrained(tmp_path, state_dict=plain)
    with pytest.raises(UserError, match="14 of 14 alphas are missing") as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_models_of_the_same_config_are_untouched():
    config = transformers.LlamaConfig(**TINY)
    one, other = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    convert(one)
    assert (type(config), config.model_type) == (transformers.LlamaConfig, "llama")
    assert other.config.model_type == "llama"
    assert one.config is one.model.config
    assert isinstance(one, transformers.LlamaForCausalLM)


def test_a_converted_model_is_pickled():
    model = build()
    convert(model)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(output(again), output(model))


def test_a_converted_part_of_a_model_is_marked_itself(tmp_path):
    import sdd.interop.converted  # noqa: F401

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build("Llama", "Model")

        def forward(self, x):
            return self.backbone(x)[0]

    wrapper = Wrapper()
    convert(wrapper)
    wrapper.backbone.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded), wrapper(TOKENS))


def test_a_config_without_a_description_is_one_line():
    import sdd.interop.converted  # noqa: F401

    config = transformers.AutoConfig.for_model("sdd-llama", **TINY)
    with pytest.raises(UserError, match="without sdd_conversion"):
        transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="sdd-nothing"):
        transformers.AutoConfig.for_model("sdd-nothing")
