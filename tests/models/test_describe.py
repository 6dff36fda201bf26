import re

import pytest

from sdd.models import ModelConfig, count_parameters, model_presets
from sdd.models.describe import list_presets, show_preset
from sdd.models.elimination import left_out_norms
from sdd.placement import Norm, Placement, placements


def test_list_names_every_preset_and_placement_with_its_source() -> None:
    text = list_presets()
    for name, config in model_presets.items():
        assert re.search(rf"^{re.escape(name)} .* {count_parameters(config).published:,}$", text, re.MULTILINE)
    for name, placement in placements.items():
        assert re.search(rf"^{name} +\w", text, re.MULTILINE)
        assert placement.source in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("placement", placements.values(), ids=placements.keys())
def test_one_preset_shows_counts_flops_and_every_norm(placement: Placement) -> None:
    config = ModelConfig(
        n_layers=8, d_model=64, d_ff=176, n_heads=4, n_kv_heads=2, vocab_size=512, context=32, placement=placement
    )
    text = show_preset("nano", config)
    count = count_parameters(config)
    assert f"{count.total:,}" in text
    assert f"{6 * (count.matrices + count.head) + 12 * 8 * 64 * 32:,}" in text
    assert placement.init in text
    for site in placement.norms:
        left_out = ", left out" if site in left_out_norms(config, 0) else ""
        assert re.search(rf"^  {site} +(SDD layer|RMSNorm){left_out}  ", text, re.MULTILINE), site
    assert ("left out where" in text) == bool(left_out_norms(config, 0))
    if "attn_out" in placement.norms:
        alpha = placement.norms["attn_out"].alpha(8)
        assert re.search(rf"^  attn_out .*{alpha:.4g}", text, re.MULTILINE)


def test_residual_scale_and_tied_head_are_shown() -> None:
    config = ModelConfig(
        n_layers=8,
        d_model=64,
        d_ff=176,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=512,
        context=32,
        tie_embeddings=True,
        placement=placements["deepnorm"],
    )
    text = show_preset("x", config)
    assert "(2L)^(1/4) x + f, i.e. 2 x" in text
    assert "tied to the embedding" in text


def test_blocks_that_differ_are_shown_apart() -> None:
    placement = Placement({"attn_in": Norm(), "ffn_in": Norm()}, overrides={0: {"attn_in": None}, -1: {"ctx": Norm()}})
    config = ModelConfig(
        n_layers=4, d_model=64, d_ff=176, n_heads=4, n_kv_heads=2, vocab_size=512, context=32, placement=placement
    )
    titles = re.findall(r"^Norms in (.*)$", show_preset("x", config), re.MULTILINE)
    assert titles == ["block 0", "block 1, 2", "block 3"]
