"""`sdd export`: a run as a folder that transformers loads, with or without this package beside it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

from sdd.data import Tokenizer
from sdd.errors import UserError
from sdd.evals.text import TrainedRun, load_trained, tokenizer_of
from sdd.files import aside_folder
from sdd.interop import architecture, card, fresh
from sdd.interop.fold import fold
from sdd.interop.imported import NOTE
from sdd.interop.library import library
from sdd.interop.ties import to_theirs
from sdd.report.runs import RunHistory, load_run

MODELING = Path(__file__).with_name("modeling_sdd.py")
#: Read there and here alike, to see whether both tokenizers give the same ids.
_TEXTS = ["The quick brown fox\n\n  jumps over 12,345 lazy dogs.", "Café, naïve — Ωμέγα; 漢字\ttab"]
_TEMPERATURE = 0.8  # what `sdd generate` takes


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        kind: the class of the model, see `architecture.CLASSES`.
        agreement: of its logits with the run's.
        remarks: lines about what was folded, left out or is different there.
    """

    kind: architecture.Kind
    agreement: fresh.Agreement
    remarks: list[str]


def export_run(
    run: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    folded: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a run for transformers, load it in a fresh process, and keep it only if it computes the same.

    Args:
        run: the run directory.
        out: the new folder.
        checkpoint: the step or path of a checkpoint, of a run that may be unfinished; None for the newest of a
            finished run.
        folded: merge what merges at inference, see `sdd.interop.fold`.
        say: receives one line before work that takes a while.

    Raises:
        UserError: if the run is unfinished or has diverged and no checkpoint is named, has no tokenizer, or a placement
            that the exported class does not know; or if the folder exists. Nothing is written.
        NotTheSame: if the exported model does not compute what the run does. Nothing stays.
    """
    with library("sdd export"), aside_folder(out) as folder:
        history = load_run(run)
        trained = load_trained(run, checkpoint)
        if checkpoint is None:
            _check_finished(history, trained)
        model = trained.model.cpu().float()
        tokenizer = tokenizer_of(trained.config)
        kind = architecture.kind_of(model.config)
        say(f"writing {architecture.CLASSES[kind]}, {sum(p.numel() for p in model.parameters()):,} parameters")
        remarks = _write_model(folder, trained, tokenizer.eos, kind, folded)
        remarks += _write_tokenizer(folder, tokenizer, model.config.context)
        _write_generation(folder, tokenizer, model.config.vocab_size)
        say("comparing it with the run, in a process without sdd")
        try:
            agreement, ids = fresh.compare(folder, model, _TEXTS)
        except fresh.NotTheSame as error:
            if not folded:
                raise
            raise fresh.NotTheSame(f"{error}; eps is too large beside what is folded: export without --fold") from None
        if ids != [tokenizer.encode(text) for text in _TEXTS]:
            remarks.append("the tokenizer gives other ids in transformers than here for some texts")
        exported = Exported(kind, agreement, remarks)
        notes = card.Notes(architecture.CLASSES[kind], kind != "sdd", trained.step, str(agreement), remarks)
        remarks += card.write(folder, history, trained.config, notes)
    return exported


def _check_finished(history: RunHistory, trained: TrainedRun) -> None:
    """Refuse a run that is not what it was to become."""
    if trained.step == 0 and (history.path / NOTE).is_file():
        return
    if history.status != "done":
        wish = "" if history.status == "did not converge" else f"finish it (sdd resume {history.path}), or "
        raise UserError(
            f"{history.path} {'' if history.status == 'did not converge' else 'is '}{history.status} "
            f"({history.reason}): {wish}name a checkpoint all the same with --checkpoint {trained.step}"
        )
    if trained.step != history.step:
        raise UserError(
            f"the newest whole checkpoint of {history.path} is of step {trained.step}, the run went to {history.step}: "
            f"name it all the same with --checkpoint {trained.step}"
        )


def _write_model(
    folder: Path, trained: TrainedRun, eos: int | None, kind: architecture.Kind, folded: bool
) -> list[str]:
    """Weights and config; returns what was folded."""
    import transformers

    from sdd.interop.modeling_sdd import SDDConfig, SDDForCausalLM

    config, said = trained.model.config, []
    state = to_theirs(trained.model, kind)
    ends = {"eos_token_id": eos, "pad_token_id": None}
    if kind == "sdd":
        fields = architecture.own_fields(config)
        if folded:
            state, fields, said = fold(state, config)
        cls, settings = SDDForCausalLM, SDDConfig(**fields, **ends)
        settings.auto_map = {  # pyright: ignore[reportAttributeAccessIssue]
            "AutoConfig": "modeling_sdd.SDDConfig",
            "AutoModel": "modeling_sdd.SDDModel",
            "AutoModelForCausalLM": "modeling_sdd.SDDForCausalLM",
        }
        shutil.copyfile(MODELING, folder / MODELING.name)
    else:
        cls = getattr(transformers, architecture.CLASSES[kind])
        settings = cls.config_class(**architecture.native_fields(config, kind), **ends)
        said = ["nothing folds: no norm has only SDD readers"] if folded else []
    with torch.device("meta"):
        theirs = cls(settings)
    theirs.load_state_dict(state, strict=False, assign=True)
    theirs.tie_weights()
    lacking = [name for name, parameter in theirs.named_parameters() if parameter.is_meta]
    assert not lacking, f"without weights: {lacking}"
    theirs.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for the user alone
        shutil.copymode(folder / "config.json", file)
    return said


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> list[str]:
    """The tokenizer's files; returns what is different from the run's."""
    import transformers

    spec, remarks = json.loads(tokenizer.data), []
    if (spec.get("post_processor") or {"type": "ByteLevel"})["type"] != "ByteLevel":  # which adds no token
        remarks.append("the tokenizer's post_processor is left out: the run was trained on text with nothing around it")
        spec["post_processor"] = None
    backend = tokenizers.Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None}))
    end = None if tokenizer.eos is None else backend.id_to_token(tokenizer.eos)
    if end is None:
        remarks.append("the tokenizer has no end of text: texts end at their length, and batches cannot be padded")
    named = {} if end is None else {"eos_token": end, "pad_token": end}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **named,
    ).save_pretrained(folder)
    if spec == json.loads(tokenizer.data):
        tokenizer.save(folder / "tokenizer.json")  # its hash stays, by which token files know it
    return remarks


def _write_generation(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """How to write text by default: as `sdd generate` does, never an id without text."""
    import transformers

    silent = (~tokenizer.writable(vocab_size)).nonzero()[0].tolist()
    transformers.GenerationConfig(
        do_sample=True,
        temperature=_TEMPERATURE,
        top_k=0,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.eos,
        suppress_tokens=silent or None,
    ).save_pretrained(folder)
