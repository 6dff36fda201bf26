"""`sdd import`: a model of transformers as a run at step 0, which every command for runs takes."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdd import __version__
from sdd.data import Tokenizer
from sdd.errors import UserError, is_out_of_memory, one_line
from sdd.files import aside_folder, read_json_object, write_aside
from sdd.interop.architecture import CLASSES, NATIVE, Kind, own_fields
from sdd.interop.library import library
from sdd.interop.ties import to_ours
from sdd.models import LanguageModel, ModelConfig
from sdd.train import RunConfig, Trainer, config_io
from sdd.train.config import DataConfig, OptimConfig
from sdd.train.run_dir import RunDir
from sdd.train.schedule import fit

#: The file of a run that says where it was imported from.
NOTE = "imported.json"
#: The most that a float32 logit may differ from the source's, in standard deviations of the logits.
TOLERANCE = 1e-4
_ROWS, _TOKENS = 2, 64
_MAY_DIFFER = ("model.context", "model.eliminate_norms")
#: Fields of an export's config on which no logit depends, or which exports of earlier versions lack.
_FREE = ("sdd", "bos_token_id", "initializer_range", "tensor_parallel")
_LR = 3e-4  # of the presets that are as large as most models that are imported


@dataclass(frozen=True)
class Imported:
    """What was taken in.

    Attributes:
        kind: the class that it had, see `architecture.CLASSES`.
        config: of the run.
        difference: the largest of a logit from the source's, in standard deviations of the logits.
        remarks: lines about what was dropped or fitted.
    """

    kind: Kind
    config: RunConfig
    difference: float
    remarks: list[str]


def import_model(
    folder: Path,
    out: Path,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Imported:
    """Make a run at step 0 from a folder with a model of Llama, Qwen3 or Olmo2, or an export of a run.

    Args:
        folder: holds config.json, weights, and tokenizer.json unless the settings name one.
        out: the new run directory.
        settings: fields of the run's config by dotted name, for going on with the training; of the model only the
            context may be changed.
        say: receives one line before work that takes a while.

    Raises:
        UserError: if there is no model, one that does not fit (the message names what), no tokenizer, a setting that is
            wrong, or the run directory exists. Nothing is written.
    """
    settings = dict(settings or {})
    fixed = [name for name in settings if name.startswith("model.") and name not in _MAY_DIFFER]
    if fixed:
        raise UserError(f"{fixed[0]} is that of the imported model: leave it out")
    kind = _kind(folder)
    with library("sdd import") as transformers, aside_folder(out) as aside:
        source_config = _read_config(folder, kind, transformers)
        model_config = own_model(source_config, folder) if kind == "sdd" else native_model(source_config, kind, folder)
        config, remarks = _run_config(folder, model_config, source_config, settings)
        say(f"reading {CLASSES[kind]} from {folder}")
        source = _load(folder, kind, transformers)
        weights = _weights(source, model_config, kind, folder)
        trainer = Trainer(replace(config, compile=False), RunDir(aside))  # it computes no step here
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(weights[name])
        difference = _compare(trainer.model, source, folder)
        trainer.config = _moved(config, aside, out)
        trainer.save()
        config_io.save(trainer.config, aside / "config.json")
        note = {"folder": str(folder.absolute()), "class": CLASSES[kind], "sdd": __version__, "difference": difference}
        write_aside(aside / NOTE, json.dumps(note, indent=2) + "\n")
    known, context = model_config.context, trainer.config.model.context
    if context > known:
        remarks.append(f"model.context={context} is longer than the model's {known}: it never saw later positions")
    if getattr(source_config, "attention_dropout", 0):
        remarks.append(f"attention_dropout={source_config.attention_dropout} is dropped: runs have no dropout")
    return Imported(kind, trainer.config, difference, remarks)


# --- the source


def _kind(folder: Path) -> Kind:
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}: give the folder of a model in transformers' format, on this machine")
    config = read_json_object(folder / "config.json")
    if "model_type" not in config:
        what = "is a run already: sdd resume, eval and generate take it" if "model" in config else ""
        raise UserError(f"{folder} {what or 'names no model_type in its config.json, or the file is damaged'}")
    name = config["model_type"]
    if not isinstance(name, str) or name not in CLASSES:
        raise UserError(
            f"{folder} holds a {one_line(name)[:100]} model: sdd import takes {', '.join(CLASSES)} (the last are "
            "exports of runs); a model of another kind stays in transformers, see sdd.convert"
        )
    return cast(Kind, name)


def _class(kind: Kind, transformers: Any) -> Any:
    if kind != "sdd":
        return getattr(transformers, CLASSES[kind])
    from sdd.interop.modeling_sdd import SDDForCausalLM

    return SDDForCausalLM


def _read_config(folder: Path, kind: Kind, transformers: Any) -> Any:
    if read_json_object(folder / "config.json").get("quantization_config"):
        raise UserError(f"{folder} is quantised (quantization_config): sdd import takes whole weights")
    try:
        return _class(kind, transformers).config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its validation raises
        raise UserError(f"{folder}/config.json is no valid config of {CLASSES[kind]}: {_first_line(error)}") from None


def _load(folder: Path, kind: Kind, transformers: Any) -> nn.Module:
    """The model in float32.

    Raises:
        UserError: if the weights cannot be read or do not fit: transformers would draw what is missing.
    """
    try:
        source, found = _class(kind, transformers).from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
        )
    except Exception as error:  # of several libraries, whose errors share no base class
        if is_out_of_memory(error):
            raise
        raise UserError(f"the weights of {folder} cannot be read: {_first_line(error)}") from None
    for what, names in found.items():
        if names:
            first = sorted(map(str, names))[0]
            raise UserError(f"the weights of {folder} do not fit its config ({what.replace('_', ' ')}: {first})")
    return source.eval()


def _weights(source: nn.Module, config: ModelConfig, kind: Kind, folder: Path) -> dict[str, Tensor]:
    try:
        return to_ours(source.state_dict(), config, kind)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _first_line(error: Exception) -> str:
    return one_line(next(iter(str(error).strip().splitlines()), type(error).__name__))[:300]


# --- the model


def native_model(source: Any, kind: Kind, folder: Path) -> ModelConfig:
    """The model of a config of Llama, Qwen3 or Olmo2.

    Raises:
        UserError: naming the first thing that runs do not have.
    """
    rope = source.rope_parameters or {}
    heads, width = source.num_attention_heads, source.hidden_size
    sliding = "sliding_attention" in (getattr(source, "layer_types", None) or ())
    unfit = {
        "attention_bias=true (biases)": getattr(source, "attention_bias", False),
        "mlp_bias=true (biases)": getattr(source, "mlp_bias", False),
        f"hidden_act={source.hidden_act!r} (runs have silu)": source.hidden_act != "silu",
        f"rope scaling ({one_line(rope.get('rope_type'))})": rope.get("rope_type") != "default",
        "partial_rotary_factor (runs rotate whole heads)": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "a sliding window": sliding or getattr(source, "sliding_window", None),
        f"head_dim={getattr(source, 'head_dim', None)} (runs have hidden_size / heads, {width / heads:g})": (
            getattr(source, "head_dim", None) not in (None, width / heads)
        ),
    }
    found = next((what for what, is_there in unfit.items() if is_there), None)
    if found:
        raise UserError(f"{folder} has {found}, which a run does not have: it cannot be imported")
    try:
        return ModelConfig(
            n_layers=source.num_hidden_layers,
            d_model=width,
            d_ff=source.intermediate_size,
            n_heads=heads,
            n_kv_heads=source.num_key_value_heads,
            vocab_size=source.vocab_size,
            context=source.max_position_embeddings,
            rope_theta=float(rope["rope_theta"]),
            tie_embeddings=source.tie_word_embeddings,
            placement=NATIVE[kind].replace_eps(source.rms_norm_eps),
        )
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def own_model(source: Any, folder: Path) -> ModelConfig:
    """The model of an export's config, from the part for the way back.

    Raises:
        UserError: if there is none, or if it is not the model that the rest describes.
    """
    if source.sdd is None:
        raise UserError(f"{folder} is a folded export, from which there is no way back: export the run without --fold")
    try:
        config = config_io.from_dict({"model": source.sdd}).model
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from None
    described = json.loads(json.dumps(own_fields(config)))
    for name, value in described.items():
        if getattr(source, name) != value and name not in _FREE:
            raise UserError(
                f"{folder}/config.json: {name} was changed after the export, its part 'sdd' says "
                f"{one_line(json.dumps(value))[:100]}"
            )
    return config


# --- the run


def _run_config(folder: Path, model: ModelConfig, source: Any, settings: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """The run that goes on from the model, and what was fitted; its tokenizer is still the folder's."""
    data = DataConfig()
    if "data.tokenizer" not in settings:
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder} has no tokenizer.json: name the model's tokenizer with --data.tokenizer FILE")
        tokenizer = Tokenizer.load(folder)
        end = source.eos_token_id[0] if isinstance(source.eos_token_id, list) else source.eos_token_id
        data = DataConfig(tokenizer=str(tokenizer.path), eos=end if tokenizer.eos is None else None)
    config = RunConfig(model, data, OptimConfig(lr=_LR))
    config, line = fit(config_io.with_overrides(config, settings), settings)
    return replace(config, data=config.data.absolute()), [line] if line else []


def _moved(config: RunConfig, aside: Path, out: Path) -> RunConfig:
    """The config with a tokenizer of the run's own, in `aside`, which becomes `out`."""
    assert config.data.tokenizer
    shutil.copyfile(Tokenizer.load(config.data.tokenizer).path, aside / "tokenizer.json")
    return replace(config, data=replace(config.data, tokenizer=str((out / "tokenizer.json").absolute())))


def _compare(model: LanguageModel, source: nn.Module, folder: Path) -> float:
    """The largest difference of a logit on drawn tokens.

    Raises:
        UserError: if it is too large.
    """
    device = model.embed.weight.device
    shape = (_ROWS, min(model.config.context, _TOKENS))
    tokens_BT = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = source(tokens_BT).logits
        ours = model.eval()(tokens_BT.to(device)).to("cpu")
    model.train()
    difference = ((ours - theirs).abs().max() / theirs.std()).item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"{folder} computes other logits here than in transformers ({difference:.1e} of their std, at most "
            f"{TOLERANCE:g} is allowed): it is not imported"
        )
    return difference
