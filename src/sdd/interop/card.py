"""The model card of an export: README.md and a picture of the losses, from the files of the run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd import __version__
from sdd.errors import MissingPackage, UserError, one_line
from sdd.files import read_json_object, write_aside
from sdd.interop.imported import NOTE
from sdd.models import ModelConfig, count_parameters
from sdd.placement import SITES, Norm
from sdd.report import require_report_extra
from sdd.report.curves import run_panels, seeds_note
from sdd.report.runs import RunHistory
from sdd.train.config import RunConfig

_PANELS = ("heldout", "loss")


@dataclass(frozen=True)
class Notes:
    """What the card says beside the run's own files.

    Attributes:
        model_class: the class of the model.
        native: whether transformers itself has that class.
        step: of the checkpoint.
        agreement: of the exported logits with the run's, as a sentence.
        remarks: what was folded, left out or is different.
    """

    model_class: str
    native: bool
    step: int
    agreement: str
    remarks: list[str]


def write(folder: Path, history: RunHistory, config: RunConfig, notes: Notes) -> list[str]:
    """Write README.md and, where the extra `report` is installed, curves.png; returns what is missing."""
    pictured, missing = _draw(folder, history)
    parts = [
        _front(notes),
        f"# {one_line(history.name)}",
        _opening(history, config, notes),
        _loading(notes),
        _section("Training", _training(history, config, notes)),
        _losses(history, pictured),
        _section("Model", _shape(config.model)),
        _norms(config.model),
        _limits(history, config.model),
        _section("Export", [f"Compared with the run in a fresh process: {notes.agreement}.", *notes.remarks]),
    ]
    write_aside(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")
    return missing


def _draw(folder: Path, history: RunHistory) -> tuple[bool, list[str]]:
    if not len(history.steps["step"]):
        return False, []
    try:
        require_report_extra()
    except (MissingPackage, UserError) as error:
        return False, [f"no picture of the losses: {error}"]
    from sdd.draw import curves
    from sdd.draw.style import line_styles

    panels = run_panels([history], line_styles([history.placement]))
    chosen = [panels[name] for name in _PANELS if name in panels]
    if not chosen:
        return False, []
    for file in curves.save_figure(curves.draw(chosen, title=seeds_note([history])), folder / "curves"):
        if file.suffix != ".png":
            file.unlink()
    return True, []


def _front(notes: Notes) -> str:
    """What the Hub reads. No licence is named: whose text a model was trained on, this package cannot know."""
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- sdd\n- {notes.model_class}\n---"


def _opening(history: RunHistory, config: RunConfig, notes: Notes) -> str:
    count = count_parameters(config.model)
    active = f" ({count.active:,} of them active for a token)" if config.model.moe else ""
    return (
        f"A base language model of {count.total:,} parameters{active}, placement `{one_line(history.placement)}`, "
        f"trained with sdd {__version__} (Scale-Distribution Decoupling, arXiv 2502.15499)."
    )


def _loading(notes: Notes) -> str:
    trust = "" if notes.native else ", trust_remote_code=True"
    if notes.native:
        how = "The class is transformers' own."
    else:
        how = (
            "`modeling_sdd.py` in this folder is the whole model; it needs torch and transformers (5.6 or newer). With "
            "`sdd` installed, `import sdd.interop.huggingface` takes the place of `trust_remote_code=True`."
        )
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})\n'
        'inputs = tokenizer("It was the", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"
    )
    return f"```python\n{code}\n```\n\n{how}"


def _training(history: RunHistory, config: RunConfig, notes: Notes) -> Iterator[str]:
    origin = read_json_object(history.path / NOTE)
    if origin:
        yield f"It began from the weights of {one_line(origin.get('folder', 'another model'))}."
    path = config.data.path or "classics, the built-in English prose"
    yield f"Data: {one_line(path)}."
    tokens = notes.step * config.tokens_per_step
    yield f"{notes.step:,} steps of {config.tokens_per_step:,} tokens: {tokens:,} tokens, seed {config.seed}."
    yield (
        f"Optimiser: {config.optim.name}, peak learning rate {config.optim.lr:g}, {config.optim.schedule} schedule, "
        f"{config.optim.warmup:,} steps of warm-up, weight decay {config.optim.weight_decay:g}."
    )
    environment = history.environment
    if environment:
        shown = [f"{name} {environment.get(name)}" for name in ("torch", "device", "precision", "sdd")]
        yield f"Environment: {one_line(', '.join(shown))}."
    if history.status != "done":
        yield f"The run {history.status}: {one_line(history.reason)}. This is a checkpoint of it."


def _losses(history: RunHistory, pictured: bool) -> str:
    numbers = {
        "held-out loss, nats a token": history.eval_loss,
        "held-out bits per byte": history.bits_per_byte,
        "last training loss, nats a token": float(history.steps["loss"][-1])
        if len(history.steps["loss"])
        else math.nan,
    }
    rows = [f"| {name} | {value:.4f} |" for name, value in numbers.items() if math.isfinite(value)]
    if not rows:
        return ""
    table = "\n".join(["| at the end of the run | |", "|---|---|", *rows])
    picture = "\n\n![Losses of the run against its tokens](curves.png)" if pictured else ""
    return f"## Losses\n\n{table}{picture}"


def _shape(model: ModelConfig) -> Iterator[str]:
    yield (
        f"{model.n_layers} blocks, width {model.d_model}, feed-forward width {model.d_ff}, {model.n_heads} heads "
        f"({model.n_kv_heads} for keys and values), {model.vocab_size:,} tokens, context {model.context:,}, RoPE base "
        f"{model.rope_theta:g}, {'tied' if model.tie_embeddings else 'untied'} head."
    )
    if model.moe:
        shared = f", and one of width {model.moe.d_shared} that every token uses" if model.moe.d_shared else ""
        yield f"{model.moe.n_experts} experts a block, {model.moe.top_k} a token{shared}."


def _norms(model: ModelConfig) -> str:
    placement = model.placement
    rows = [f"| {site} | {_words(placement.norms[site])} |" for site in SITES if site in placement.norms]
    table = "\n".join(["| site | norm |", "|---|---|", *rows])
    extra = [f"Residual rule: `{placement.residual}`."]
    if placement.overrides:
        extra.append(f"Other norms in the blocks {', '.join(map(str, sorted(placement.overrides)))}.")
    if placement.scales:
        extra.append(f"Learned scales without a norm: {', '.join(placement.scales)}.")
    if placement.weights != "free":
        extra.append("Rows and columns of the matrices were kept at length 1 in training.")
    return f"## Where the norms stand\n\n{table}\n\n{' '.join(extra)}"


def _words(norm: Norm) -> str:
    group = "each head" if norm.group == "head" else "full width"
    scale = "no scale" if not norm.scale else "one scale for all heads" if norm.shared_alpha else "a scale each feature"
    return f"RMS over {group}, {scale}, eps {norm.eps:g}"


def _limits(history: RunHistory, model: ModelConfig) -> str:
    lines = [
        "A base model continues text. It was not taught to follow instructions or to be safe, and it repeats what its "
        "data hold, false and harmful statements included.",
        f"It has read at most {model.context:,} tokens at once; nothing is known beyond that length.",
        "Its losses above are on text held out from its own data, with no other evaluation.",
    ]
    if model.moe:
        lines.append(
            "Each expert is a module of its own here. Quantisers and adapters see its matrices, but it is slower than "
            "grouped products. Fine-tuning elsewhere has no load balancing loss."
        )
    return _section("Limits", lines)


def _section(title: str, lines: Any) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines)
