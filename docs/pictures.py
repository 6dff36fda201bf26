"""Draw the pictures of the landing page that no study draws, into docs/images.

.venv/bin/python docs/pictures.py
"""

import json
import lzma
from pathlib import Path

import numpy as np
import torch
from torch import nn

import sdd
from sdd.draw.curves import draw, save_figure
from sdd.draw.panel import Line, Panel
from sdd.draw.style import PLACEMENT_STYLES, Style

DOCS = Path(__file__).parent
RECORDED = DOCS.parent / "tests" / "probing" / "recorded"  # ./dev bench alarm_runs
SDD, POSTNORM = PLACEMENT_STYLES["sdd"], PLACEMENT_STYLES["postnorm"]
WIDTH, DEPTH = 64, 50


def signal(layer: type[nn.Linear] | type[sdd.SDDLinear], init: float) -> np.ndarray:
    """Compute the rms of the output of each of 50 layers in a row, drawn as nn.Linear and multiplied by init."""
    torch.manual_seed(0)
    hidden, found = torch.randn(1000, WIDTH), []
    for _ in range(DEPTH):
        one = layer(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            one.weight.mul_(init)
            hidden = one(hidden)
        found.append(hidden.square().mean().sqrt().item())
    return np.array(found)


def gradients(run: str) -> np.ndarray:
    """Read the gradient's rms at each layer of the stream, over that at the last, at the last probed step."""
    layers = json.loads(lzma.decompress((RECORDED / f"{run}.json.xz").read_bytes()))["layers"]["grad_rms"][-1]
    return np.array(layers) / layers[-1]


def decoupled() -> list[Panel]:
    """Make the panels: forward without training, backward at the end of a hard run."""
    depth = np.arange(1, DEPTH + 1)
    plain = [Line(f"nn.Linear, init x{init}", depth, signal(nn.Linear, init), style) for init, style in PLAIN.items()]
    ours = [signal(sdd.SDDLinear, init) for init in PLAIN]
    ours = [Line("SDDLinear, each init", depth, np.mean(ours, 0), SDD)]
    forward = Panel("size of the signal", "rms", plain + ours, log=True, against="layer")
    lines = [
        Line(label, np.arange(len(gradients(run))), gradients(run), style, marked=True)
        for label, run, style in (
            ("Post-Norm", "hard-postnorm", POSTNORM),
            ("Post-Norm wiring with SDD", "hard-sdd", SDD),
        )
    ]
    backward = Panel("size of the gradient", "rms, last layer = 1", lines, log=True, against="block")
    return [forward, backward]


PLAIN = {1: Style("#808080", "", (5, 2)), 2: Style("#808080", "", (1.5, 1.5))}


if __name__ == "__main__":
    for path in save_figure(draw(decoupled()), DOCS / "images" / "decoupled"):
        print(path.relative_to(DOCS))
