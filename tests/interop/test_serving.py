"""An export under what serves, compiles and quantises models: matrices are matrices, norms are norms.

vLLM and SGLang do not run here. What their transformers backends do to a model is done to it by hand.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_interop import EXPERTS, config_of, drawn_model, exported, logits, saved
from helpers_models import drawn_tokens
from torch import Tensor, nn

import sdd.interop.huggingface  # noqa: F401
from sdd.interop import architecture
from sdd.interop.modeling_sdd import SDDConfig, SDDForCausalLM, SDDRMSNorm
from sdd.models import LanguageModel
from sdd.placement import Norm, Placement, placements

CASES = {"sdd": {}, "sdd-released": {}, "hybrid": {}, "keel": {}, "ngpt": {}, "moe": {"moe": EXPERTS}}
#: Norms without a weight at the embedding and at the end.
BARE = Placement({**placements["sdd"].norms, "embed": Norm(scale=False), "final": Norm(scale=False)})


def ours(case: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    return drawn_model(config_of("sdd" if case == "moe" else case, **CASES[case]), dtype=dtype)


@pytest.fixture(params=CASES)
def theirs(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return exported(ours(request.param))


def tokens_of(theirs: transformers.PreTrainedModel, length: int = 12, rows: int = 2) -> Tensor:
    return drawn_tokens(config_of("sdd", vocab_size=theirs.config.vocab_size), length, rows)


def linears(theirs: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in theirs.named_modules() if isinstance(module, nn.Linear)}


def replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


# --- attention, caches and compilers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_gives_the_same_logits(attention: str, theirs: Any) -> None:
    tokens = tokens_of(theirs)
    theirs.set_attn_implementation("eager")
    expected = logits(theirs, tokens, use_cache=False)
    theirs.set_attn_implementation(attention)
    torch.testing.assert_close(logits(theirs, tokens, use_cache=False), expected)


def test_a_static_cache_writes_the_same_text(theirs: Any) -> None:
    prompt = tokens_of(theirs, 4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        theirs.generate(prompt, cache_implementation="static", **options), theirs.generate(prompt, **options)
    )


@pytest.mark.parametrize("case", ["sdd", "moe"])
def test_the_whole_model_is_one_graph(case: str) -> None:
    theirs: Any = exported(ours(case))
    tokens = tokens_of(theirs)
    expected = logits(theirs, tokens, use_cache=False)
    torch.compiler.reset()
    compiled = torch.compile(theirs, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


# --- quantisers


def check_quantised(theirs: Any, tokens: Tensor, expected: Tensor, norms: dict[str, Tensor], bound: float) -> None:
    for name, weight in norms.items():
        assert torch.equal(theirs.get_parameter(name), weight), f"{name} is a norm and stays as it was"
    off = (logits(theirs, tokens).float() - expected).square().mean().sqrt() / expected.std()
    assert 0 < off < bound, f"off by {off:.3g} of the logits' standard deviation"


@pytest.mark.ties
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_int8_weights_of_torchao(case: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    saved(exported(ours(case, torch.float32)), tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = tokens_of(plain)
    expected, norms = logits(plain, tokens), {n: p for n, p in plain.named_parameters() if p.ndim == 1}
    settings = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    kinds = {name: type(module.weight) for name, module in linears(theirs).items()}
    assert {name for name, kind in kinds.items() if kind is nn.Parameter} == {"lm_head"}  # transformers leaves it out
    check_quantised(theirs, tokens, expected, norms, 0.1)


@pytest.mark.ties
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_dynamic_quantisation_of_torch(case: str) -> None:
    quantize = pytest.importorskip("torch.ao.quantization", reason="this torch has no eager quantisation")
    plain = exported(ours(case, torch.float32))
    tokens, names = tokens_of(plain), set(linears(plain))
    expected, norms = logits(plain, tokens), {n: p for n, p in plain.named_parameters() if p.ndim == 1}
    theirs = quantize.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    found = {
        name for name, module in theirs.named_modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)
    }
    assert found == names, "every matrix and nothing else"
    check_quantised(theirs, tokens, expected, norms, 0.4)


# --- what the transformers backends of serving engines do


def test_what_the_engines_ask_of_class_and_config(theirs: Any) -> None:
    assert theirs._supports_attention_backend
    assert theirs.base_model_prefix == "model"
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"):
        assert type(getattr(theirs.config, name)) is int
    for name in ("vocab_size", "intermediate_size", "max_position_embeddings"):
        assert type(getattr(theirs.config, name)) is int
    assert theirs.config.rope_parameters["rope_type"] == "default"
    attentions = [layer.self_attn for layer in theirs.model.layers]
    assert [each.layer_idx for each in attentions] == list(range(theirs.config.num_hidden_layers))
    assert all(each.is_causal for each in attentions)
    assert all(name.startswith(("model.", "lm_head.")) for name in theirs.state_dict())
    modules = {name for name, _ in theirs.named_modules()}
    assert {rule.replace("*", "0") for rule in theirs._tp_plan} <= modules


def test_the_engines_call_and_their_embedding(theirs: Any) -> None:
    """One row of tokens, no cache, no dict, their own words to the attention; the embedding is a module of theirs."""
    tokens = tokens_of(theirs, rows=1)
    expected = logits(theirs, tokens)

    class Embedding(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.table = weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.table[ids]

    theirs.model.set_input_embeddings(Embedding(theirs.get_input_embeddings().weight.detach()))
    positions = torch.arange(tokens.shape[1])[None]
    call = {"use_cache": False, "position_ids": positions, "return_dict": False, "attention_instances": {}}
    with torch.no_grad():
        hidden = theirs.model(input_ids=tokens, inputs_embeds=None, **call)[0][0]
        torch.testing.assert_close(theirs.lm_head(hidden)[None], expected)


def test_every_linear_layer_may_be_another_module(theirs: Any) -> None:
    class Opaque(nn.Module):  # has no weight to look at
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.inner = [linear]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x)

    tokens = tokens_of(theirs)
    expected = logits(theirs, tokens)
    for name, module in linears(theirs).items():
        replace(theirs, name, Opaque(module))
    assert torch.equal(logits(theirs, tokens), expected)


def test_every_rms_norm_may_be_the_engines(theirs: Any) -> None:
    """SGLang takes what is called RMSNorm for one over the last dimension, with `variance_epsilon` and the weight."""
    tokens = tokens_of(theirs)
    expected = logits(theirs, tokens)
    chosen = {name: each for name, each in theirs.named_modules() if type(each).__name__.endswith("RMSNorm")}
    assert chosen
    for name, module in chosen.items():
        width = None if module.weight is None else module.weight.shape
        norm = nn.RMSNorm(width or (theirs.config.hidden_size,), module.variance_epsilon, module.weight is not None)
        norm.weight = module.weight
        replace(theirs, name, norm.double())
    torch.testing.assert_close(logits(theirs, tokens), expected)
    assert all(type(each) is SDDRMSNorm for each in chosen.values()), "a norm over heads is not one of them"


@pytest.mark.parametrize("placement", ["sdd", "hybrid", "ngpt", "moe", BARE])
@pytest.mark.parametrize("cut", [1, 2])
def test_the_plan_cuts_the_model_into_stages(placement: Any, cut: int) -> None:
    """As pipelines do: what a stage lacks passes on what it is given, and hidden states come in as embeddings."""
    model = drawn_model(config_of(placement), dtype=torch.float64) if placement != "moe" else ours("moe")
    whole, stages = exported(model), [exported(model) for _ in range(2)]
    tokens = tokens_of(whole)
    expected = whole.model(tokens).last_hidden_state
    names = list(whole.config.base_model_pp_plan)
    assert names == [name for name, _ in whole.model.named_children()]
    before, after = names[: names.index("layers")], names[names.index("layers") + 1 :]
    for stage, there in zip(stages, (before, after), strict=True):
        for name in (*before, *after):
            if name not in there:
                setattr(stage.model, name, nn.Identity())
        for index in range(len(stage.model.layers)):
            if (index < cut) != (there is before):
                stage.model.layers[index] = Passing()
    hidden = stages[0].model(tokens, use_cache=False).last_hidden_state
    found = stages[1].model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected)


class Passing(nn.Module):
    """A layer of another stage."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x


def test_experts_with_norms_are_not_taken_for_a_fused_kernel() -> None:
    """Engines put a kernel that knows three matrices in the place of a list `experts`, or of a stack of matrices."""
    theirs = exported(ours("moe"))
    for layer in theirs.model.layers:  # pyright: ignore[reportGeneralTypeIssues]
        assert not isinstance(layer.mlp.experts, nn.ModuleList)
        assert any(parameter.ndim != 3 for parameter in layer.mlp.experts.parameters())


def test_names_of_experts_are_those_of_earlier_exports() -> None:
    config = config_of("sdd", moe=EXPERTS)
    theirs = SDDForCausalLM(SDDConfig(**architecture.own_fields(config)))
    names = {f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(EXPERTS.n_experts)}
    assert names <= theirs.state_dict().keys()
