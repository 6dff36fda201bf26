"""Tiny models in transformers' classes, and finished runs that were never trained."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers_models import tiny_config
from helpers_moe import drawn
from torch import Tensor

from sdd.interop import architecture
from sdd.interop.architecture import CLASSES, Kind
from sdd.interop.fresh import generated
from sdd.interop.library import library
from sdd.interop.modeling_sdd import SDDConfig, SDDForCausalLM
from sdd.interop.ties import to_theirs
from sdd.models import LanguageModel, ModelConfig, MoEConfig
from sdd.placement import Placement, placements
from sdd.train import DataConfig, RunConfig, Trainer, config_io
from sdd.train.run_dir import RunDir

EXPERTS = MoEConfig(n_experts=4, top_k=2, d_shared=6, renormalise=True)
DENSE, MIXTURES = list(placements), [name for name in placements if name != "ngpt"]
#: eps large enough that a forgotten one shows.
EPS = 1e-3


def drawn_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(seed)
    return drawn(LanguageModel(config)).to(dtype).eval()


def config_of(placement: str | Placement, **changes: Any) -> ModelConfig:
    chosen = placements[placement] if isinstance(placement, str) else placement
    return tiny_config(chosen.replace_eps(EPS), **changes)


def exported(model: LanguageModel, kind: Kind = "sdd") -> transformers.PreTrainedModel:
    """A model in a class of transformers, as the export makes it."""
    if kind == "sdd":
        theirs: Any = SDDForCausalLM(SDDConfig(**architecture.own_fields(model.config)))
    else:
        cls = getattr(transformers, CLASSES[kind])
        fields = architecture.native_fields(model.config, kind)
        theirs = cls(cls.config_class(**fields, eos_token_id=None, attn_implementation="eager"))
    theirs.to(model.embed.weight.dtype)
    found = theirs.load_state_dict(to_theirs(model, kind), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= ({"lm_head.weight"} if model.config.tie_embeddings else set())
    theirs.tie_weights()
    return theirs.eval()


def logits(theirs: transformers.PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return theirs(tokens, **options).logits


def text_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "numbers.txt"
    file.write_text("\n".join(f"Line {number} says {number * number}." for number in range(2000)))
    return file


def finished_run(folder: Path, placement: str | Placement, **changes: Any) -> Path:
    """A run of 4 steps with the built-in tokenizer and drawn weights, as the trainer would leave it."""
    model = tiny_config(placement, **{"vocab_size": 4096, **changes})
    data = DataConfig(path=str(text_file(folder / "data")), batch_size=2)
    config = RunConfig(model, data, steps=4, device="cpu", sample_tokens=0, compile=False)
    run = folder / "run"
    run.mkdir()
    trainer = Trainer(config, RunDir(run))
    torch.manual_seed(0)
    drawn(trainer.model)
    trainer.step = 4
    trainer.save()
    config_io.save(config, run / "config.json")
    for step in range(1, 5):
        row = {"step": step, "loss": 9.0 - step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 24 * step, "seconds": step}
        trainer.run_dir.append("metrics.jsonl", row)
    trainer.run_dir.append("metrics.jsonl", {"step": 4, "eval_loss": 5.0, "eval_bits_per_byte": 2.0})
    trainer.run_dir.write_json("result.json", {"status": "done", "step": 4, "steps": 4})
    return run


def in_this_process(folder: Path, tokens_BT: Tensor, texts: list[str]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """What the fresh process answers, without the seconds that a process costs."""
    import sdd.interop.huggingface  # noqa: F401

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        found[str(dtype).removeprefix("torch.")] = logits(theirs.eval(), tokens_BT).float()
        if dtype == torch.float32:
            with torch.no_grad():
                found |= generated(theirs, tokens_BT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return found, [tokenizer(text)["input_ids"] for text in texts]


def saved(theirs: transformers.PreTrainedModel, folder: Path) -> Path:
    """Save a model, without a progress bar on stderr."""
    with library("a test"):
        theirs.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
