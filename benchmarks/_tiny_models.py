"""Tiny models of every class of transformers and timm, and a batch that each of them takes."""

import importlib
import inspect
from collections.abc import Iterator
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
    "num_decoder_layers depth num_key_value_heads num_experts_per_tok top_k num_blocks vision_num_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts decoder_num_attention_heads",
    8: "head_dim d_kv attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank "
    "attention_head_dim patch_size mamba_d_state state_size num_queries",
    1: "rescale_every",
    16: "projection_dim d_inner num_conv_pos_embeddings text_embed_dim",
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}


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
        import timm  # pyright: ignore[reportMissingImports]

        return timm.create_model(name, pretrained=False)
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[transformers_classes()[name]]
    return getattr(transformers, name)(tiny_config(config_class))


def tiny_config(config_class: Any) -> Any:
    """A config with every size that `_SIZE` knows made small, that of its parts included."""
    return config_class(**_overrides(config_class()))


def _overrides(config: Any) -> dict[str, Any]:
    small: dict[str, Any] = {}
    # Widths of stages belong to their numbers of heads, so they stay where those are a list.
    staged = any(name.endswith("heads") and isinstance(value, list | tuple) for name, value in vars(config).items())
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            small[name] = {"model_type": value.model_type, **_overrides(value)}
        elif name == "pad_token_id" and value is None:
            small[name] = 0  # heads for sequences ask for one
        elif type(value) is int and name in _SIZE and value > _SIZE[name] and not (staged and _SIZE[name] == 32):
            small[name] = _SIZE[name]
        elif type(value) is int and name.endswith(("_token_id", "_token_index")) and value >= 64:
            small[name] = 50 + len(small) % 14
        elif isinstance(value, list | tuple) and name == "depths":
            small[name] = [min(depth, 2) for depth in value]
        elif name in ("image_size", "img_size") and type(value) is int and value > 64:
            small[name] = 64
    return small


def examples(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Batches that the model may take, the plainest first."""
    names = list(inspect.signature(model.forward).parameters)
    values = _values(model)
    main = getattr(model, "main_input_name", names[0])
    first = main if main in values else next((name for name in names if name in values), None)
    if first is None:
        return
    labels = {"labels": values["input_ids"]} if "labels" in names else {}
    for value in values[first] if isinstance(values[first], list) else [values[first]]:
        plain = {first: value}
        decoder = {name: values[name] for name in ("decoder_input_ids",) if name in names}
        others = {name: values[name] for name in ("input_ids", "attention_mask", "bbox") if name in names}
        images = {"pixel_values": values["pixel_values"][0]} if "pixel_values" in names else {}
        for more in ({}, decoder, others, {**others, **decoder}, {**images, **others}, {**labels, **decoder}):
            yield {**more, **plain}
        for shape in ((2,), (2, 1)):
            if "labels" in names:
                yield {**plain, "labels": torch.zeros(shape, dtype=torch.long)}


def _values(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (2, 16), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    channels: Any = _of_config(model, "num_channels", 3)
    size: Any = _of_config(model, "image_size", 64)
    size = int(torch.as_tensor(size).flatten()[0])
    mels, frames = _of_config(model, "num_mel_bins", 80), 2 * _of_config(model, "max_source_positions", 64)
    images = [noise(2, channels, side, side) for side in dict.fromkeys((size, 64, 224))]
    return {
        "input_ids": tokens,
        "decoder_input_ids": tokens[:, :8],
        "attention_mask": torch.ones_like(tokens),
        "bbox": torch.zeros(2, 16, 4, dtype=torch.long),
        "pixel_values": [*images, noise(2, _of_config(model, "num_frames", 4), channels, size, size)],
        "input_values": [noise(2, 4000), noise(2, 1024, _of_config(model, "num_mel_bins", 128))],
        "input_features": [noise(2, mels, frames), noise(2, frames, mels)],
        "inputs_embeds": noise(2, 16, 32),
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
    for name in ("torch", "transformers", "timm"):
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception as error:  # a broken installation: its models are left out
            found[name] = f"missing ({type(error).__name__})"
    return found
