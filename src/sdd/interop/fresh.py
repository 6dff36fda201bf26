"""What an exported folder computes in a process of its own, beside what the run computes.

The process sees transformers and the folder only: `sdd` cannot be imported in it.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdd.errors import SddError
from sdd.models import LanguageModel

#: The most that a logit may differ in float32, in standard deviations of the logits.
FLOAT32_TOLERANCE = 1e-4
#: How much further than our own bfloat16 logits those of the export may be from the float32 logits.
BFLOAT16_FACTOR = 1.5
_ROWS, _TOKENS = 2, 256
_HEAD = """
import json, sys
sys.modules["sdd"] = None  # as where it is not installed
import torch
from typing import Any
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
"""
_CHILD = """
folder, scratch = sys.argv[1:]
tokens_BT = load_file(f"{scratch}/tokens.safetensors")["tokens"]
logits = {}
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=True, local_files_only=True, output_loading_info=True
        )
        bad = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
        if bad:
            sys.exit(f"weights that do not fit: {bad}")
        name = str(dtype).removeprefix("torch.")
        logits[name] = model.eval()(tokens_BT, use_cache=False).logits.float()
        if name == "float32":
            logits |= generated(model, tokens_BT)
save_file(logits, f"{scratch}/logits.safetensors")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
with open(f"{scratch}/texts.json") as file:
    ids = [tokenizer(text)["input_ids"] for text in json.load(file)]
with open(f"{scratch}/ids.json", "w") as file:
    json.dump(ids, file)
"""


def generated(model: Any, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Logits of new tokens, by steps with a cache (`steps`) and by one pass over the same tokens (`whole`).

    The first row is padded on the left. The fresh process runs this text, so it needs torch and transformers only.
    """
    from transformers import GenerationConfig

    prompt = max(1, min(8, tokens_BT.shape[1] // 2))
    prompt_BT = tokens_BT[:, :prompt]
    padded_BT = torch.ones_like(prompt_BT)
    padded_BT[0, : prompt // 2] = 0
    model.generation_config = GenerationConfig(pad_token_id=0)
    new = {"max_new_tokens": prompt, "min_new_tokens": prompt, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(prompt_BT, attention_mask=padded_BT, do_sample=False, use_cache=True, **new)
    ids_BT = out.sequences[:, :-1]
    seen_BT = torch.cat([padded_BT, torch.ones_like(ids_BT[:, prompt:])], 1)
    places_BT = (seen_BT.cumsum(-1) - 1).clamp(min=0)  # as generate counts: nGPT's scales after the rotation see them
    whole = model(ids_BT, seen_BT, places_BT, use_cache=False).logits[:, prompt - 1 :]
    return {"steps": torch.stack(out.logits, 1).float(), "whole": whole.float().contiguous()}


class NotTheSame(SddError):
    """An export that does not compute what the run computes."""

    exit_code = 3
    heading = "the export is not kept: "


@dataclass(frozen=True)
class Agreement:
    """How far the exported model is from the run's.

    Attributes:
        float32: the largest difference of a logit, in standard deviations of the logits.
        bfloat16: rms of the difference from the float32 logits, in the same unit.
        own_bfloat16: the same of our own forward pass with weights in bfloat16.
        generated: the largest difference of a logit between generation with a cache, token by token and with a padded
            row, and one pass over the same tokens, in the same unit; float32.
    """

    float32: float
    bfloat16: float
    own_bfloat16: float
    generated: float

    def __str__(self) -> str:
        return (
            f"float32 within {self.float32:.1e} of the logits' std; bfloat16 {self.bfloat16:.2g} from the float32 "
            f"logits (our own bfloat16 {self.own_bfloat16:.2g}); generation with a cache within {self.generated:.1e}"
        )


def compare(folder: Path, model: LanguageModel, texts: list[str]) -> tuple[Agreement, list[list[int]]]:
    """Load a folder in a fresh process and compare its logits on drawn tokens with the run's.

    Args:
        folder: the export.
        model: the run's, in float32 on the CPU; it is in bfloat16 afterwards.
        texts: to be tokenised there.

    Returns:
        How far the two are apart, and the ids of the texts.

    Raises:
        NotTheSame: if the logits differ by more than the tolerances, are not finite, or the process fails.
    """
    config = model.config
    shape = (_ROWS, min(config.context, _TOKENS))
    tokens_BT = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    theirs, ids = _in_fresh_process(folder, tokens_BT, texts)
    with torch.no_grad():
        ours = model.eval()(tokens_BT)
        if not ours.isfinite().all():
            raise NotTheSame("the run's own logits are not finite")
        own_bfloat16 = model.to(torch.bfloat16)(tokens_BT).float()
    found = agreement(ours, own_bfloat16, theirs)
    check(found)
    return found, ids


def agreement(ours: Tensor, own_bfloat16: Tensor, theirs: dict[str, Tensor]) -> Agreement:
    """The distances between logits."""
    std = ours.std()
    return Agreement(
        ((theirs["float32"] - ours).abs().max() / std).item(),
        ((theirs["bfloat16"] - ours).square().mean().sqrt() / std).item(),
        ((own_bfloat16 - ours).square().mean().sqrt() / std).item(),
        ((theirs["steps"] - theirs["whole"]).abs().max() / std).item(),
    )


def check(found: Agreement) -> None:
    """Compare the distances with the tolerances.

    Raises:
        NotTheSame: if one is larger, or not a number.
    """
    if not found.float32 <= FLOAT32_TOLERANCE:
        raise NotTheSame(
            f"its float32 logits differ from the run's by {found.float32:.1e} of their std, at most "
            f"{FLOAT32_TOLERANCE:g} is allowed"
        )
    if not found.generated <= FLOAT32_TOLERANCE:
        raise NotTheSame(
            f"its logits while it generates with a cache differ from those of one pass by {found.generated:.1e} of "
            f"their std, at most {FLOAT32_TOLERANCE:g} is allowed; is this transformers newer than this sdd?"
        )
    if not found.bfloat16 <= BFLOAT16_FACTOR * found.own_bfloat16:
        raise NotTheSame(
            f"its bfloat16 logits are {found.bfloat16:.2g} of the std from the float32 logits, more than "
            f"{BFLOAT16_FACTOR} times the {found.own_bfloat16:.2g} of our own"
        )


def _in_fresh_process(folder: Path, tokens_BT: Tensor, texts: list[str]) -> tuple[dict[str, Tensor], list[list[int]]]:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        save_file({"tokens": tokens_BT}, scratch / "tokens.safetensors")
        (scratch / "texts.json").write_text(json.dumps(texts))
        command = [sys.executable, "-I", "-c", _HEAD + inspect.getsource(generated) + _CHILD, str(folder), name]
        alone = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(  # it asks nothing: nobody would see the question
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, **alone}, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NotTheSame(f"it does not load in a fresh process: {last[:300]}")
        return load_file(scratch / "logits.safetensors"), json.loads((scratch / "ids.json").read_text())
