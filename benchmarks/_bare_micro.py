"""The `micro` model of placement `sdd` as one bare PyTorch script: no logging, no checkpoints, no package.

The yardstick of benchmarks/train_overhead.py. It prints one JSON line: tokens/s over the timed steps, first loss.
"""

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

L, C, D_FF, H, KV, V, T, B = 8, 256, 704, 4, 2, 4096, 256, 16
D = C // H


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(C, n * D, bias=False) for n in (H, KV, KV))
        self.o = nn.Linear(C, C, bias=False)
        self.gate, self.up = nn.Linear(C, D_FF, bias=False), nn.Linear(C, D_FF, bias=False)
        self.down = nn.Linear(D_FF, C, bias=False)
        self.q_norm, self.k_norm = Norm(D), Norm(D)
        self.o_norm, self.down_norm, self.attn_post, self.ffn_post = (Norm(C) for _ in range(4))

    def forward(self, x, cos, sin):
        q = rotate(self.q_norm(self.q(x).view(B, T, H, D)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k(x).view(B, T, KV, D)).transpose(1, 2), cos, sin)
        v = self.v(x).view(B, T, KV, D).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = self.attn_post(x + self.o_norm(self.o(y.transpose(1, 2).reshape(B, T, C))))
        return self.ffn_post(x + self.down_norm(self.down(F.silu(self.gate(x)) * self.up(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.embed_norm = nn.Embedding(V, C), Norm(C)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.head = nn.Linear(C, V, bias=False)
        angle = torch.outer(torch.arange(T), 500_000.0 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=(2.5 * C) ** -0.5)

    def forward(self, tokens, targets):
        x = self.embed_norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tokens", help="a headerless uint16 token file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--untimed", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    data = np.memmap(args.tokens, np.uint16, "r")
    model = Model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    first, began = None, 0.0
    for step in range(args.steps):
        if step == args.untimed:
            began = time.perf_counter()
        starts = random.integers(0, len(data) - T - 1, B)
        batch = torch.from_numpy(np.stack([data[s : s + T + 1] for s in starts]).astype(np.int64))
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first = first or loss.item()
    seconds = time.perf_counter() - began
    print(json.dumps({"tokens_per_second": (args.steps - args.untimed) * B * T / seconds, "first_loss": first}))


if __name__ == "__main__":
    main()
