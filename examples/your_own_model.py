"""SDD in a model of your own: build it, convert it, train it.

python examples/your_own_model.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import sdd

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
)
print(sdd.convert(model), end="\n\n")  # the last layer has one output, so it stays

x = torch.randn(512, 8)
y = (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:3].abs()
optimizer = torch.optim.AdamW(sdd.param_groups(model), lr=1e-2)
for step in range(101):
    loss = F.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}")
