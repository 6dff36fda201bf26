"""Converted models of transformers through save_pretrained and from_pretrained."""

import json
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from helpers_tiny import ENCODER, TINY, TOKENS, build, output, trained

from sdd import SDDLinear, convert, param_groups, revert
from sdd.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

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
    vit = transformers.ViTConfig(**ENCODER, image_size=16, patch_size=8)
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


@pytest.mark.parametrize("loads", ["sdd", "plain"])
def test_a_loaded_model_is_converted_again_after_a_reversion_or_in_two_steps(loads, tmp_path):
    import sdd.interop.converted  # noqa: F401

    calibration: dict[str, Any] = {"mode": "calibrate", "batches": [{"input_ids": TOKENS}]}
    model = build()
    if loads == "sdd":
        convert(model, **calibration)
    model.save_pretrained(tmp_path / "first")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    if loads == "sdd":
        revert(model)
        assert model.config.model_type == "llama"
    for name in ("q_proj", "v_proj"):
        convert(model, **calibration, include=name)
        assert model.config.model_type == "sdd-llama"
    model.save_pretrained(tmp_path / "second")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    assert type(again).__name__ == "SDDLlamaForCausalLM"
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("junk", ["text", 3, {"layers": []}])
def test_a_config_with_a_description_that_is_none(junk, tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = build()
    convert(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sdd_conversion": junk}))
    with pytest.raises(UserError, match="not a description of a conversion"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


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


def test_a_model_type_of_ones_own_is_loaded_by_the_auto_classes(tmp_path):
    """As in a fresh process: the own type is registered, its converted one has not been asked for yet."""
    import sdd.interop.converted  # noqa: F401

    own = type("OwnConfig", (transformers.LlamaConfig,), {"model_type": "own-type"})
    kind = type("OwnForCausalLM", (transformers.LlamaForCausalLM,), {"config_class": own})
    transformers.AutoConfig.register("own-type", own)
    transformers.AutoModelForCausalLM.register(own, kind)
    model = build()
    convert(model)
    trained(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "sdd-own-type"}))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, kind)
    assert torch.equal(output(loaded), output(model))
    assert "sdd-sdd-llama" not in transformers.models.auto.configuration_auto.CONFIG_MAPPING


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


@pytest.mark.parametrize("part", ["LlamaForCausalLM", "LlamaModel"])
def test_hidden_states_and_attentions_are_returned_as_before(part):
    model = build("Llama", part.removeprefix("Llama"), attn_implementation="eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    before = build("Llama", part.removeprefix("Llama"), attn_implementation="eager")(input_ids=TOKENS, **wanted)
    convert(model)
    for one in (pickle.loads(pickle.dumps(model)), model):
        after = one(input_ids=TOKENS, **wanted)
        assert len(after.hidden_states) == len(before.hidden_states) == 3
        assert len(after.attentions) == len(before.attentions) == 2


def test_a_backbone_that_reads_its_own_hidden_states_runs():
    backbone = transformers.BeitBackbone(transformers.BeitConfig(**ENCODER, image_size=16, patch_size=8))
    convert(backbone.eval())
    assert backbone(torch.ones(1, 3, 16, 16)).feature_maps


def test_the_trainer_finds_the_task_by_the_name_of_the_class():
    from transformers.models.auto import modeling_auto

    model = build()
    convert(model)
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert names["sdd-llama"] == type(model).__name__ == "SDDLlamaForCausalLM"
    assert transformers.AutoModelForCausalLM._model_mapping[type(model.config)] is type(model)
    assert len(list(transformers.AutoModelForCausalLM._model_mapping.keys())) > 100


def llava():
    text, vision = transformers.LlamaConfig(**{**TINY, "vocab_size": 40}), {"image_size": 16, "patch_size": 8}
    vision = transformers.CLIPVisionConfig(**ENCODER, **vision, projection_dim=16)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=39)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("alone", [False, True])
def test_a_part_converted_alone_or_by_name_is_saved_with_the_whole_and_alone(alone, tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = llava()
    body = model.model.language_model
    if alone:
        convert(body)
    else:
        convert(model, include="language_model.*")
    whole, part = output(trained(model)), output(body)
    model.save_pretrained(tmp_path / "whole")
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(output(loaded), whole)
    for one in (body, loaded.model.language_model):
        one.save_pretrained(tmp_path / "part")
        assert torch.equal(output(transformers.AutoModel.from_pretrained(tmp_path / "part").eval()), part)
    revert(body, [{"input_ids": TOKENS}])
    assert type(model) is transformers.LlavaForConditionalGeneration
    assert model.config.model_type == "llava"
    assert not hasattr(model.config, "sdd_conversion")


@pytest.mark.parametrize("part", ["model", "layer"])
def test_a_parent_that_is_put_together_after_the_conversion_is_saved_with_its_part(part, tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = llava()
    body = transformers.LlamaModel(transformers.LlamaConfig(**{**TINY, "vocab_size": 40})).eval()
    convert(body if part == "model" else body.layers[1])
    trained(body)
    if part == "model":
        model.model.language_model = body
    else:
        model.model.language_model.layers[1] = body.layers[1]
    whole = output(model)
    with pytest.warns(UserWarning, match="this LlavaForConditionalGeneration has other layers converted by sdd"):
        model.save_pretrained(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "again")
    for folder in ("whole", "again"):
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(output(loaded), whole)


def test_a_converted_model_whose_parts_become_plain_is_saved_as_one_without_them(tmp_path):
    import sdd.interop.converted  # noqa: F401

    model = build()
    convert(model)
    output(model)
    model.model.layers = build().model.layers
    with pytest.warns(UserWarning, match="is a LlamaForCausalLM from now on"):
        model.save_pretrained(tmp_path)
    assert torch.equal(output(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()), output(model))


def test_a_model_whose_class_builds_sdd_layers_itself_is_saved_as_ever(tmp_path):
    import sdd.interop.converted  # noqa: F401

    class Own(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.layer = SDDLinear(16, 16)
            self.post_init()

    model = Own(transformers.LlamaConfig(**TINY))
    model.save_pretrained(tmp_path)
    assert type(model) is Own
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_the_body_of_a_converted_model_is_saved_alone(tmp_path):
    import sdd.interop.converted  # noqa: F401

    for one in (model := build()), model.model:
        convert(one)
        trained(model).model.save_pretrained(tmp_path)
        body = transformers.AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(output(body), output(model.model))
        assert model.config is model.model.config
        revert(model, [{"input_ids": TOKENS}])


def test_the_trainer_leaves_alpha_without_decay_resumes_and_saves(tmp_path):
    """The recipe of docs/convert.md."""
    pytest.importorskip("accelerate")
    import sdd.interop.converted  # noqa: F401

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8))]

    def trainer(folder):
        model = build()
        convert(model, example={"input_ids": TOKENS})
        args = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=4, save_steps=2, weight_decay=0.1, report_to=[], use_cpu=True
        )
        groups = param_groups(model, weight_decay=args.weight_decay)
        optimizers = (torch.optim.AdamW(groups, lr=args.learning_rate), None)
        return transformers.Trainer(model, args, train_dataset=rows, optimizers=optimizers)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    decayed = {id(p) for group in whole.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    alphas = {id(p) for name, p in whole.model.named_parameters() if name.endswith("alpha")}
    assert decayed
    assert not decayed & alphas
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    for other in (resumed.model, loaded):
        pairs = zip(whole.model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
