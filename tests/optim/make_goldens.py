#!/usr/bin/env python3
"""Writes optimizer_goldens.json: 20 updates of every optimizer by PyTorch in float64.

Two tensors, a weight of 8 that decays and a bias of 5 that does not. The gradient of element i at
step t (from 1) depends on the parameter, so that an error feeds back:
    g = 0.5 w - 0.3 + 0.25 ((7 i + 3 t) mod 5 - 2),   w at first 0.1 (i - 3)
A schedule halves the rate from step 11 on. Decoupled decay of SGD is not in PyTorch: the parameter is
multiplied by 1 - rate * decay before its step, as AdamW does.

Run: python3 tests/optim/make_goldens.py   (needs torch)
"""
import json
import os

import torch

STEPS = 20
RATE = 0.05


def gradient(w, t):
    i = torch.arange(w.numel())
    return 0.5 * w - 0.3 + 0.25 * ((7 * i + 3 * t) % 5 - 2)


def initial(n):
    return 0.1 * (torch.arange(n, dtype=torch.float64) - 3)


def train(make, l2, weight_decay, decay_by_hand):
    weight, bias = torch.nn.Parameter(initial(8)), torch.nn.Parameter(initial(5))
    decay = 0.0 if decay_by_hand else l2 + weight_decay
    optimizer = make([{"params": [weight], "weight_decay": decay}, {"params": [bias]}])
    snapshots = {}
    for t in range(1, STEPS + 1):
        rate = RATE if t <= 10 else RATE / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p in (weight, bias):
            p.grad = gradient(p.detach(), t)
        if decay_by_hand:
            with torch.no_grad():
                weight.mul_(1 - rate * weight_decay)
        optimizer.step()
        if t in (1, 2, 10, STEPS):
            snapshots[str(t)] = weight.tolist() + bias.tolist()
    return snapshots


CASES = [
    ("sgd", "sgd", dict()),
    ("sgd_l2", "sgd", dict(l2=0.1)),
    ("sgd_weight_decay", "sgd", dict(weight_decay=0.2)),
    ("momentum", "momentum", dict()),
    ("momentum_l2", "momentum", dict(l2=0.1)),
    ("momentum_weight_decay", "momentum", dict(weight_decay=0.2)),
    ("nesterov", "nesterov", dict()),
    ("nesterov_l2", "nesterov", dict(l2=0.1)),
    ("adam", "adam", dict()),
    ("adam_l2", "adam", dict(l2=0.1)),
    ("adam_weight_decay", "adam", dict(weight_decay=0.2)),
]


def main():
    cases = []
    for name, kind, options in CASES:
        l2, weight_decay = options.get("l2", 0.0), options.get("weight_decay", 0.0)
        if kind == "adam":
            cls = torch.optim.AdamW if weight_decay else torch.optim.Adam
            make = lambda groups: cls(
                [dict(weight_decay=0.0) | g for g in groups], lr=RATE, betas=(0.9, 0.99), eps=1e-8)
        else:
            make = lambda groups: torch.optim.SGD(
                groups, lr=RATE, momentum=0.0 if kind == "sgd" else 0.9, nesterov=kind == "nesterov")
        by_hand = kind != "adam" and weight_decay > 0
        cases.append(dict(name=name, type=kind, l2=l2, weight_decay=weight_decay,
                          parameters=train(make, l2, weight_decay, by_hand)))
    out = dict(source=f"PyTorch {torch.__version__}, float64, tests/optim/make_goldens.py",
               steps=STEPS, rate=RATE, cases=cases)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "optimizer_goldens.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(out, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
