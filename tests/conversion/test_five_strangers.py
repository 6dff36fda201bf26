"""What a new user does with a model that the code does not name: convert, train, save, load in a fresh process."""

import functools
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers", reason="models of transformers: extra hf")

from helpers_five import STRANGERS

import sdd
import sdd.interop.converted
from sdd.conversion import ConversionReport

pytestmark = pytest.mark.ties
STEPS = 50
RELOAD = """
import json, sys, torch, transformers
import sdd.interop.converted
same = {}
for name, (auto, folder) in json.loads(sys.argv[1]).items():
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    batch, logits = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        same[name] = torch.equal(model(**batch).logits, logits)
print(json.dumps(same))
"""


class Trained(NamedTuple):
    report: ConversionReport
    losses: list[float]
    folder: Path


@functools.cache
def _trained(name: str, folder: Path) -> Trained:
    stranger = STRANGERS[name]
    model: Any = stranger.build().train()
    batch = stranger.batches()
    report = sdd.convert(model, example=batch(0))
    optimizer = torch.optim.AdamW(sdd.param_groups(model, weight_decay=0.1), lr=3e-3)
    losses = []
    for step in range(1, STEPS + 1):
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval().save_pretrained(folder / name)
    with torch.no_grad():
        torch.save((batch(0), model(**batch(0)).logits), folder / name / "expected.pt")
    return Trained(report, losses, folder / name)


@functools.cache
def _reloaded(folder: Path) -> dict[str, bool]:
    """Whether each model has the same logits in a process that only imports what the README names."""
    names = [name for name in STRANGERS if not _missing(name)]
    asked = {name: (STRANGERS[name].auto, str(_trained(name, folder).folder)) for name in names}
    command = [sys.executable, "-W", "ignore", "-c", RELOAD, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _missing(name: str) -> list[str]:
    return [package for package in STRANGERS[name].packages if find_spec(package) is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("five")


@pytest.fixture(params=STRANGERS)
def name(request: pytest.FixtureRequest) -> str:
    if missing := _missing(request.param):
        pytest.skip(f"needs {', '.join(missing)}: extra ties")
    return request.param


def test_every_converted_layer_is_proven(name: str, folder: Path) -> None:
    report = _trained(name, folder).report
    assert report.proof is not None
    assert report.proof.verdicts
    assert {verdict.outcome for verdict in report.proof.verdicts} == {"proven"}
    assert report.share > 0.4  # the rest are embeddings, heads, convolutions


def test_the_loss_on_real_data_falls(name: str, folder: Path) -> None:
    losses = _trained(name, folder).losses
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_fresh_process_gives_the_same_logits(name: str, folder: Path) -> None:
    assert _reloaded(folder)[name]


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_the_code_does_not_name_it(stranger: Any) -> None:
    kind = re.sub(r"(For\w+|Model)$", "", stranger.model).lower()
    sources = Path(sdd.__file__).parent.rglob("*.py")
    assert not [path for path in sources if kind in path.read_text(encoding="utf-8").lower()]
