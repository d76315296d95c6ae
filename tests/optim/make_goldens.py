#!/usr/bin/env python3
"""Writes optimizer_goldens.json: 20 updates of every optimizer by PyTorch in float64.

Two tensors, a weight of 8 that decays and a bias of 5 that does not. The gradient of element i at
step t (from 1) depends on the parameter, so that an error feeds back:
    g = 0.5 w - 0.3 + 0.25 ((7 i + 3 t) mod 5 - 2),   w at first 0.1 (i - 3)
A schedule halves the rate from step 11 on. Decoupled decay is in PyTorch's AdamW only: elsewhere the
parameter is multiplied by 1 - rate * decay before its step, as AdamW does. Clipping is
torch.nn.utils'; a multiplier of the rate or the decay is that of the weight's parameter group.

Run: python3 tests/optim/make_goldens.py   (needs torch)
"""
import json
import os

import torch

STEPS = 20
RATE = 0.05
DEFAULTS = dict(l2=0.0, weight_decay=0.0, momentum=0.9, rho=0.9, epsilon=1e-8, centered=False,
                clip_norm=0.0, clip_value=0.0, rate_multiplier=1.0, decay_multiplier=1.0)


def gradient(w, t):
    i = torch.arange(w.numel())
    return 0.5 * w - 0.3 + 0.25 * ((7 * i + 3 * t) % 5 - 2)


def initial(n):
    return 0.1 * (torch.arange(n, dtype=torch.float64) - 3)


def make(kind, groups, o):
    optim = torch.optim
    if kind == "adam":
        cls = optim.AdamW if o["weight_decay"] else optim.Adam
        groups = [dict(weight_decay=0.0) | g for g in groups]
        return cls(groups, lr=RATE, betas=(0.9, 0.99), eps=o["epsilon"])
    if kind == "adagrad":
        return optim.Adagrad(groups, lr=RATE, eps=o["epsilon"])
    if kind == "adadelta":
        return optim.Adadelta(groups, lr=RATE, rho=o["rho"], eps=o["epsilon"])
    if kind == "rmsprop":
        return optim.RMSprop(groups, lr=RATE, alpha=o["rho"], eps=o["epsilon"], momentum=o["momentum"],
                             centered=o["centered"])
    return optim.SGD(groups, lr=RATE, momentum=0.0 if kind == "sgd" else o["momentum"],
                     nesterov=kind == "nesterov")


def train(kind, o):
    weight, bias = torch.nn.Parameter(initial(8)), torch.nn.Parameter(initial(5))
    by_hand = kind != "adam" and o["weight_decay"] > 0
    decay = (o["l2"] + (0.0 if by_hand else o["weight_decay"])) * o["decay_multiplier"]
    optimizer = make(kind, [{"params": [weight], "weight_decay": decay}, {"params": [bias]}], o)
    snapshots = {}
    for t in range(1, STEPS + 1):
        rate = RATE if t <= 10 else RATE / 2
        optimizer.param_groups[0]["lr"] = rate * o["rate_multiplier"]
        optimizer.param_groups[1]["lr"] = rate
        for p in (weight, bias):
            p.grad = gradient(p.detach(), t)
        if o["clip_norm"]:
            torch.nn.utils.clip_grad_norm_([weight, bias], o["clip_norm"])
        if o["clip_value"]:
            torch.nn.utils.clip_grad_value_([weight, bias], o["clip_value"])
        if by_hand:
            with torch.no_grad():
                weight.mul_(1 - rate * o["rate_multiplier"] * o["weight_decay"] * o["decay_multiplier"])
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
    ("adagrad", "adagrad", dict(epsilon=1e-10)),
    ("adagrad_l2", "adagrad", dict(epsilon=1e-10, l2=0.1)),
    ("adadelta", "adadelta", dict(epsilon=1e-6)),
    ("adadelta_weight_decay", "adadelta", dict(epsilon=1e-6, weight_decay=0.2)),
    ("rmsprop", "rmsprop", dict(momentum=0.0)),
    ("rmsprop_l2", "rmsprop", dict(momentum=0.0, l2=0.1)),
    ("rmsprop_momentum", "rmsprop", dict(momentum=0.5)),
    ("rmsprop_centered", "rmsprop", dict(momentum=0.0, centered=True)),
    ("rmsprop_centered_momentum", "rmsprop", dict(momentum=0.5, centered=True, weight_decay=0.2)),
    ("sgd_clip_norm", "sgd", dict(clip_norm=0.75, l2=0.1)),
    ("adam_clip_norm", "adam", dict(clip_norm=0.75)),
    ("momentum_clip_value", "momentum", dict(clip_value=0.3, l2=0.1)),
    ("momentum_multipliers", "momentum", dict(l2=0.1, rate_multiplier=0.25, decay_multiplier=3.0)),
    ("adam_multipliers", "adam", dict(weight_decay=0.2, rate_multiplier=2.0, decay_multiplier=0.5)),
]


def main():
    cases = []
    for name, kind, options in CASES:
        o = DEFAULTS | options
        cases.append(dict(name=name, type=kind, parameters=train(kind, o)) | o)
    out = dict(source=f"PyTorch {torch.__version__}, float64, tests/optim/make_goldens.py",
               steps=STEPS, rate=RATE, cases=cases)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "optimizer_goldens.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(out, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
