"""Tiny models of every class of transformers and timm, and a batch that each of them takes."""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

#: What a field of a config becomes, where the default is a larger number.
_SIZES = {
    32: "hidden_size d_model n_embd embed_dim dim hidden_dim embedding_size d_embed emb_dim word_embed_proj_dim "
    "vision_embed_dim attention_hidden_size decoder_hidden_size encoder_hidden_size fpn_feature_size "
    "moe_intermediate_size mask_feature_size feature_size encoder_hidden_dim fusion_hidden_size projection_hidden_dim",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner dim_feedforward mlp_dim "
    "encoder_intermediate_size decoder_intermediate_size shared_expert_intermediate_size vocab_size "
    "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions vocab_size_per_layer_input "
    "ffn_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_key_value_heads num_experts_per_tok top_k num_blocks vision_num_layers "
    "moe_k attn_layer_period expert_layer_period full_attention_interval",
    4: "rotary_dim mamba_n_heads "
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts decoder_num_attention_heads",
    8: "head_dim d_kv attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank "
    "attention_head_dim patch_size mamba_d_state state_size num_queries",
    1: "rescale_every n_group topk_group n_groups attn_layer_offset mamba_n_groups",
    16: "projection_dim d_inner num_conv_pos_embeddings text_embed_dim mamba_d_head",
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}
#: Fields of single kinds of config.
#: Sizes without a default that a model needs.
_NEEDED = ("vocab_size", "num_experts_per_tok", "n_routed_experts", "num_experts")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OF_KIND: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 16},
    "blt": {"use_cache": False},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 0, 0]}},
    "glm_image_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "glm_ocr_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "glm4v_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 0, 0]}},
    "granite_speech5_encoder": {"context_size": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "informer": {"prediction_length": 4, "context_length": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [4, 4], "is_decoder": True},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16},
}
#: Arguments that make a model of timm small, the smallest first; builders take what their class knows.
_TIMM: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64},
    {"depth": 2, "img_size": 64},
    {"img_size": 64},
    {"depth": 2},
    {},
)


def transformers_classes() -> dict[str, str]:
    """Every model class of the auto mappings, with the type of its config."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            for kind, classes in mapping.items():
                for model_class in classes if isinstance(classes, tuple | list) else [classes]:
                    found.setdefault(model_class, kind)
    return dict(sorted(found.items()))


def timm_models() -> list[str]:
    """The name of the smallest-looking model of each file of timm, and all of its test models."""
    import timm  # pyright: ignore[reportMissingImports]

    smallest: dict[str, str] = {}
    for name in sorted(timm.list_models(), key=_size_by_name, reverse=True):
        smallest[timm.model_entrypoint(name).__module__] = name
    return sorted({*smallest.values(), *timm.list_models("test_*")})


def _size_by_name(name: str) -> tuple[int, int]:
    marks = [mark in name for mark in ("femto", "atto", "pico", "nano", "tiny", "xxs", "_xs", "small", "_s")]
    return marks.index(True) if any(marks) else len(marks), len(name)


def build(item: str) -> nn.Module:
    """A tiny model of `transformers/CLASS`, or a small one of `timm/NAME`, with drawn weights."""
    library, _, name = item.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        return _timm(name)
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class, config = getattr(transformers, name), tiny_config(CONFIG_MAPPING[transformers_classes()[name]])
    parts = [value for value in vars(config).values() if type(value) is model_class.config_class]
    return model_class(config if type(config) is model_class.config_class or not parts else parts[0])


def _timm(name: str) -> nn.Module:
    """The model with the smallest arguments of `_TIMM` that its builder takes."""
    import timm  # pyright: ignore[reportMissingImports]

    for arguments in _TIMM[:-1]:
        with suppress(Exception):
            return timm.create_model(name, pretrained=False, **arguments)
    return timm.create_model(name, pretrained=False, **_TIMM[-1])


def tiny_config(config_class: Any) -> Any:
    """A config with every size that `_SIZE` knows made small, that of its parts included."""
    return config_class(**_overrides(config_class()))


def _overrides(config: Any) -> dict[str, Any]:
    fields = vars(config)
    # Widths of stages belong to their numbers of heads, so they stay where those are a list.
    staged = any(name.endswith("heads") and isinstance(value, list | tuple) for name, value in fields.items())
    small = {name: _smaller(name, value, staged) for name, value in fields.items()}
    small = {name: value for name, value in small.items() if value is not None}
    if any("out_indices" in name and isinstance(value, list | tuple) for name, value in fields.items()):
        small.pop("num_hidden_layers", None)  # layers whose outputs are taken
    if fields.get("num_key_value_heads", 0) == fields.get("num_attention_heads", None):
        small["num_key_value_heads"] = small.get("num_attention_heads", fields["num_attention_heads"])
    kinds = fields.get("layer_types")
    if isinstance(kinds, list | tuple):  # one layer of each kind
        small["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
        small.update({name: len(small["layer_types"]) for name in small if name == "num_hidden_layers"})
    return {**small, **_OF_KIND.get(config.model_type, {})}


def _smaller(name: str, value: Any, staged: bool) -> Any:
    """What a field becomes; None where it stays."""
    if hasattr(value, "model_type") and hasattr(value, "to_dict"):
        return {"model_type": value.model_type, **_overrides(value)}
    if type(value) is int and name in _SIZE:
        return _SIZE[name] if value > _SIZE[name] and not (staged and _SIZE[name] == 32) else None
    if type(value) is int and name.endswith(("_token_id", "_token_index")) and value >= 64:
        return 50 + sum(map(ord, name)) % 14
    if type(value) is int and name in ("image_size", "img_size"):
        return min(value, 64)
    if name in ("pad_token_id", "head_dim") and value is None:
        return {"pad_token_id": 0, "head_dim": 8}[name]  # heads for sequences ask for a token of padding
    if name in _NEEDED and value is None:
        return _SIZE[name]
    if name == "depths" and isinstance(value, list | tuple):
        return [min(depth, 2) for depth in value]
    if name == "hidden_sizes" and isinstance(value, tuple):
        return list(value)
    if name == "num_kv_shared_layers":
        return 0
    return _small_rope(value) if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) else None


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Sections of multimodal rotary embeddings for heads of 8 channels instead of 128."""
    total = sum(rope.get("mrope_section") or []) * 8 // 128
    return {**rope, "mrope_section": [total - 2 * (total // 3), total // 3, total // 3]} if total else rope


def examples(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Batches that the model may take, the plainest first."""
    names = list(inspect.signature(model.forward).parameters)
    values = {name: value for name, value in _values(model).items() if name in names}
    main = getattr(model, "main_input_name", names[0])
    first = main if main in values else next((name for name in names if name in values), None)
    if first is None:
        return
    labels = {"labels": values["input_ids"]} if "labels" in names and "input_ids" in values else {}
    chosen = {name: value[0] if isinstance(value, list) else value for name, value in values.items()}
    chosen.pop("inputs_embeds" if "input_ids" in chosen else "", None)
    decoder, others, images = (
        {name: chosen[name] for name in group if name in chosen}
        for group in (("decoder_input_ids",), ("input_ids", "attention_mask", "bbox"), ("pixel_values",))
    )
    more = ({}, decoder, others, {**others, **decoder}, {**images, **others}, {**images, **others, **decoder})
    for value in values[first] if isinstance(values[first], list) else [values[first]]:
        for extra in (*more, {**labels, **decoder}, {**images, **others, **labels}):
            yield {**extra, first: value}
        for shape in ((2,), (2, 1)):
            if "labels" in names:
                yield {first: value, "labels": torch.zeros(shape, dtype=torch.long)}
    for length in (3000, 1000, 100):  # frames of sound beside text or codes, and everything at once
        sound = {"input_features": torch.randn(2, _of_config(model, "num_mel_bins", 80), length)}
        yield {**chosen, **{name: value for name, value in sound.items() if name in names}}


def _values(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (2, 16), generator=generator)
    end = _of_config(model, "eos_token_id", 2)
    tokens[:, -1] = end if type(end) is int and 0 <= end < 64 else 2

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    channels: Any = _of_config(model, "num_channels", None) or _of_config(model, "in_channels", 3)
    size: Any = _of_config(model, "image_size", 64)
    size = int(torch.as_tensor(size).flatten()[0])
    patch, frame = _of_config(model, "patch_size", 8), _of_config(model, "temporal_patch_size", 1)
    patch = patch if type(patch) is int else 8
    mels, frames = _of_config(model, "num_mel_bins", 80), 2 * _of_config(model, "max_source_positions", 64)
    images = [noise(2, channels, side, side) for side in dict.fromkeys((size, 64, 224))]
    if type(model).__name__.endswith("MultipleChoice"):
        tokens = tokens[:, None].repeat(1, 2, 1)
    boxes = torch.zeros(*tokens.shape, 4, dtype=torch.long)
    return {
        "input_ids": tokens,
        "decoder_input_ids": tokens[..., :8],
        "attention_mask": torch.ones_like(tokens),
        "bbox": boxes if type(model).__name__.startswith("Layout") else boxes.float(),
        "pixel_values": [*images, noise(2, _of_config(model, "num_frames", 4), channels, size, size)],
        "input_values": [noise(2, 4000), noise(2, 1024, _of_config(model, "num_mel_bins", 128)), noise(2, 32000)],
        "input_features": [noise(2, mels, frames), noise(2, frames, mels), noise(2, 1, 1001, 64)],
        "inputs_embeds": noise(2, 16, 32),
        "query_embeds": noise(1, 8, 32),
        "hidden_states": [noise(16, channels * frame * patch**2), noise(2, 16, 32), noise(16, 32)],
        "grid_thw": torch.tensor([[1, 4, 4]]),
        "x": [noise(2, 3, side, side) for side in (64, 96, 160, 224, 256, 384)],
    }


def _of_config(model: nn.Module, name: str, default: Any) -> Any:
    """A field of the model's config or of one of its parts."""
    config = getattr(model, "config", None)
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    found = [value for part in parts if isinstance(value := getattr(part, name, None), int | list | tuple)]
    return found[0] if found else default


def versions() -> dict[str, str]:
    """The libraries that are installed here."""
    found = {}
    for name in ("timm", "torch", "torchvision", "transformers"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ModuleNotFoundError:
            found[name] = "missing"
        except Exception as error:  # a broken installation: its models are left out
            found[name] = f"broken ({type(error).__name__})"
    return found
