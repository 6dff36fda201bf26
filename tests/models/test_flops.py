import pytest
from helpers_models import drawn_tokens, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdd.models import LanguageModel, ModelConfig, model_presets
from sdd.models.flops import training_flops
from sdd.placement import placements

BATCH = 2


def counted(config: ModelConfig, checkpoint: bool) -> int:
    """FLOPs of a forward and backward pass as torch counts them, attention as plain matrix products."""
    model = LanguageModel(config)
    model.checkpoint_blocks = checkpoint
    tokens = drawn_tokens(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", placements)
def test_model_flops_are_those_that_torch_counts(name: str, tied: bool) -> None:
    config = tiny_config(name, tie_embeddings=tied)
    assert counted(config, False) == BATCH * config.context * training_flops(config).model


@pytest.mark.parametrize("name", placements)
def test_recomputation_is_counted_apart(name: str) -> None:
    config = tiny_config(name)
    flops = training_flops(config, checkpoint_blocks=True)
    assert counted(config, True) == BATCH * config.context * flops.hardware
    assert flops.model == training_flops(config).model


def test_conventions() -> None:
    config = model_presets["1b"]
    flops = training_flops(config)
    assert flops.matmul == 6 * 1_059_274_752
    assert flops.attention == 12 * 16 * 2048 * 4096
    assert flops.causal == flops.matmul + flops.attention // 2
    assert training_flops(config, fused_attention=True).recomputed == 2 * 16 * 2048 * 4096
