"""LoRA on whole models: converted ones of transformers, our own, exported folders, and adapters in a fresh process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="the extra peft is not installed")

import peft
import transformers
from helpers_interop import drawn_model, exported, saved
from helpers_models import drawn_tokens, tiny_config, tiny_model

import sdd
import sdd.interop.peft as sdd_peft
from sdd.errors import UserError
from sdd.interop.library import library
from sdd.models import MoEConfig
from sdd.models.lean import runs_lean

# PEFT asks transformers for an attribute that it will lose.
pytestmark = [pytest.mark.ties, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]

SHAPE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.arange(1, 10)[None]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
#: Loads the base and the adapter that lies beside it, and writes logits.
LOAD = """
import sys, torch
import {imports}
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(torch.arange(1, 10)[None]).logits.detach(), sys.argv[3])
"""


def converted(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    options = {"intermediate_size": 32, **changes} if kind != "GPT2" else {}
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **options)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    sdd.convert(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def with_lora(model: Any, **changes: Any) -> Any:
    options = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**options)).eval()


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def check_merge(base: Any, tokens: Tensor, **lora: Any) -> None:
    before = logits(base, tokens)
    model = with_lora(base, **lora)
    y = logits(model, tokens)
    assert not torch.allclose(y, before, rtol=1e-3)
    with model.disable_adapter():
        assert close(logits(model, tokens), before)
    assert close(logits(model.merge_and_unload(), tokens), y)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_converted_model_takes_adapters_on_all_its_layers(kind: str) -> None:
    model = converted(kind).double()
    names = sdd_peft.targets(model)
    assert len(names) == {"Llama": 14, "GPT2": 8}[kind]
    check_merge(model, TOKENS, target_modules=names, modules_to_save=["alpha"])


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_stacked_experts_are_adapted_by_their_parameters(kind: str) -> None:
    model = converted(kind, num_local_experts=4, num_key_value_heads=4).double()
    check_merge(model, TOKENS, target_modules=["q_proj"], target_parameters=STACKS)


def test_stacked_experts_are_no_target_modules() -> None:
    with pytest.raises(UserError, match="is a stack of experts, no layer: adapt it by its parameters, target_param"):
        with_lora(converted("Mixtral", num_local_experts=4, num_key_value_heads=4), target_modules=["experts"])


@pytest.mark.parametrize("placement", ["sdd", "sdd-paper", "sdd-released", "sdd-prenorm"])
def test_our_models_take_adapters(placement: str) -> None:
    model = tiny_model(placement, dtype=torch.float64).eval()
    names = sdd_peft.targets(model)
    assert not (placement == "sdd-released" and any(name.endswith(("gate_proj", "up_proj")) for name in names))
    check_merge(model, drawn_tokens(model.config), target_modules=names)


def test_blocks_run_as_their_equations_while_they_have_adapters() -> None:
    base = tiny_model("sdd-paper", dtype=torch.float64).eval()
    for block in base.blocks:
        block.force_lean = True
    x = torch.randn(2, 3, base.config.d_model, dtype=torch.float64)
    model = with_lora(base, target_modules=["o_proj"])
    assert not any(runs_lean(block, x) for block in base.blocks)
    y = logits(model, drawn_tokens(base.config))
    merged = model.merge_and_unload()
    assert all(runs_lean(block, x) for block in merged.blocks)
    assert close(logits(merged, drawn_tokens(base.config)), y)


def test_plain_and_sdd_layers_of_a_model_are_adapted_together() -> None:
    model = tiny_model("sdd", dtype=torch.float64).eval()
    names = [*sdd_peft.targets(model), "v_proj", "gate_proj", "up_proj"]
    adapted = with_lora(model, target_modules=names).base_model.targeted_module_names
    assert len(adapted) == 7 * model.config.n_layers


def test_an_adapter_where_gate_and_up_share_a_norm_is_refused() -> None:
    model = with_lora(tiny_model("sdd-released"), target_modules=["gate_proj"])
    with pytest.raises(UserError, match="this placement norms gate and up together"):
        model(drawn_tokens(tiny_config("sdd-released")))


def test_a_mixture_of_ours_takes_adapters_outside_its_experts() -> None:
    experts = MoEConfig(n_experts=4, top_k=2, d_shared=6)
    model = tiny_model("sdd-paper", dtype=torch.float64, moe=experts).eval()
    names = sdd_peft.targets(model)
    assert any("shared" in name for name in names)
    check_merge(model, drawn_tokens(model.config), target_modules=names)


def test_an_exported_model_needs_nothing_of_ours() -> None:
    theirs = exported(drawn_model(tiny_config("sdd-paper"), dtype=torch.float64))
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name.rsplit(".", 1)[-1] for name in model.base_model.targeted_module_names}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    check_merge(model.unload(), TOKENS, target_modules="all-linear", task_type="CAUSAL_LM")


def reload_elsewhere(folder: Path, base: Any, model: Any, imports: str) -> Tensor:
    saved(base, folder / "base")
    with library("a test"):
        model.save_pretrained(folder / "adapter")
    arguments = [str(folder / name) for name in ("base", "adapter", "logits")]
    command = [sys.executable, "-c", LOAD.format(imports=imports), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "logits")


@pytest.mark.slow
def test_an_adapter_on_a_converted_model_reloads_in_a_fresh_process(tmp_path: Path) -> None:
    base, same = (converted("Mixtral", num_local_experts=4, num_key_value_heads=4) for _ in range(2))
    lora = {"target_modules": sdd_peft.targets(base), "target_parameters": STACKS, "modules_to_save": ["alpha"]}
    model = with_lora(base, **lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_scale" in name:
                parameter.normal_()
    found = reload_elsewhere(tmp_path, same, model, "sdd.interop.peft")
    assert torch.equal(found, logits(model))


@pytest.mark.slow
def test_an_adapter_on_an_exported_model_reloads_in_a_fresh_process(tmp_path: Path) -> None:
    model = with_lora(exported(drawn_model(tiny_config("sdd-paper"))), target_modules="all-linear")
    base = exported(drawn_model(tiny_config("sdd-paper")))
    assert torch.equal(reload_elsewhere(tmp_path, base, model, "sdd.interop.huggingface"), logits(model))


def test_transformers_loads_an_adapter_by_itself(tmp_path: Path) -> None:
    names = sdd_peft.targets(converted("Llama"))
    model = with_lora(converted("Llama"), target_modules=names)
    with library("a test"):
        model.save_pretrained(tmp_path)
    other = converted("Llama")
    other.load_state_dict(converted("Llama").state_dict())
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other.eval()), logits(model))


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mixtral"])
def test_an_adapter_of_a_converted_model_is_refused_on_an_unconverted_one(kind: str, tmp_path: Path) -> None:
    options = {"num_local_experts": 4} if kind == "Mixtral" else {}
    base = converted(kind, **options)
    targets = {"target_parameters": STACKS} if kind == "Mixtral" else {"target_modules": sdd_peft.targets(base)}
    with_lora(base, **targets).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_config(converted(kind, **options).config.__class__.__base__(**SHAPE))
    before = {name: type(module) for name, module in plain.named_modules()}
    with pytest.raises(UserError, match=r"trained on a converted model, where .* was an SDD layer"):
        peft.PeftModel.from_pretrained(plain, tmp_path)
    assert {name: type(module) for name, module in plain.named_modules()} == before
    peft.PeftModel.from_pretrained(converted(kind, **options), tmp_path)


def test_an_adapter_of_plain_layers_loads_on_either_base_and_its_file_is_that_of_peft(tmp_path: Path) -> None:
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, intermediate_size=32))
    with_lora(plain, target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert "sdd_layers" not in (tmp_path / "adapter_config.json").read_text()
    peft.PeftModel.from_pretrained(converted("Llama"), tmp_path)


def test_a_config_with_names_of_sdd_layers_can_be_built_from_its_dict() -> None:
    model = with_lora(converted("Llama"), target_modules=["q_proj", "lm_head"])
    config = model.peft_config["default"]
    assert config.sdd_layers == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert peft.LoraConfig(**config.to_dict()).sdd_layers == config.sdd_layers
