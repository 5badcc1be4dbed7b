"""Comparisons of any shape, made up by a seed: pages are tested on them without minutes of measuring."""

import math
import random

import torch

from octavo.analysis.choice import Choice, Decision, Step
from octavo.analysis.comparison import AS_IT_IS, Candidate, Cell, ComparedLayer, Comparison, Outcome
from octavo.analysis.magnitudes import LayerMagnitudes, of
from octavo.core import schemes
from octavo.ptq.rules import Rule

SCHEMES = ("int8-dynamic", "fp8-dynamic", "int8-weight-only", "int8-group64", "e3m4-dynamic")
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def llama(blocks, head=True):
    """The names of a Llama's linears."""
    names = [f"model.layers.{i}.{linear}" for i in range(blocks) for linear in LINEARS]
    return names + ["lm_head"] * head


def comparison(names, names_of_schemes=SCHEMES, seed=0, model="HuggingFaceTB/SmolLM2-135M", language=True, **changes):
    """Costs fall off with depth, are log-normal, and some cells are excluded."""
    chance = random.Random(seed)
    candidates = (Candidate(None), *(Candidate(schemes.get(name)) for name in names_of_schemes))
    layers = tuple(
        ComparedLayer(name, (name,), "Linear", (576, 576), 331776, 1327104, 4, 1024, 0.002) for name in names
    )
    cells = []
    for index, layer in enumerate(layers):
        cells.append(Cell(layer.name, AS_IT_IS, math.inf, math.inf, 0.0, 0.0, layer.bytes, 0.002))
        for number, candidate in enumerate(candidates[1:]):
            if chance.random() < 0.01 or ("group64" in candidate.name and "k_proj" in layer.name):
                cells.append(Cell(layer.name, candidate.name, excluded="a group of 64 does not divide 40 columns"))
                continue
            cost = 2e-4 * math.exp(chance.gauss(0, 1.2)) / (1 + number) * (4 if index < 7 else 1)
            ratio = 34 - 4.3 * math.log10(cost / 1e-5)
            loss = cost * chance.uniform(-0.3, 1.2) if language else cost
            seconds = 0.002 * (0.6 + 0.1 * number)
            cells.append(
                Cell(layer.name, candidate.name, 40.0, ratio, loss, cost if language else None, 340000, seconds)
            )
    base = 2.7224
    outcomes = [Outcome(AS_IT_IS, base, math.exp(base) if language else None, 0.0, None, 538_000_000, 1.31)]
    for number, candidate in enumerate(candidates[1:]):
        loss = base + 0.034 / (1 + number) ** 2.2 - 0.0006
        left = tuple(name for name in names if "k_proj" in name) if "group64" in candidate.name else ()
        outcomes.append(
            Outcome(
                candidate.name,
                loss,
                math.exp(loss) if language else None,
                loss - base + 0.004 if language else None,
                0.0008,
                220_000_000 + 2_000_000 * number,
                0.71 + 0.13 * number,
                left,
            )
        )
    settings = {
        "model": model,
        "data": "16 windows of 512 tokens of Python's own documentation, none of which served calibration or search",
        "machine": "Intel Xeon Platinum 8481C, 2 cores, AVX512-BF16, AVX512-VNNI; torch 2.13.0 on 2 threads",
        "loss": base,
        "perplexity": math.exp(base) if language else None,
        "divergence": "Kullback-Leibler divergence of the next token's distribution, in nats" if language else None,
        "bytes": 538_000_000,
        "layers": layers,
        "candidates": candidates,
        "cells": tuple(cells),
        "outcomes": tuple(outcomes),
        "seconds": {"layers": 241.3, "whole model": 62.0},
    }
    return Comparison(**{**settings, **changes})


def choice(compared, **changes):
    """Every layer gets its cheapest scheme, the head stays."""
    decisions = []
    for layer in compared.layers:
        some = [c for c in compared.cells if c.layer == layer.name and c.candidate != AS_IT_IS and c.excluded is None]
        if layer.name == "lm_head" or not some:
            why = "the output head: rounding it costs 12 times as much as any other layer and saves 3 % of the time"
            decisions.append(Decision(layer.name, AS_IT_IS, why, 0.0, layer.bytes, 0.002))
            continue
        best = min(some, key=lambda c: c.cost)
        why = f"fastest of the {len(some)} that fit; int8-dynamic would cost 4.1 times as much"
        decisions.append(Decision(layer.name, best.candidate, why, best.cost, best.bytes or 0, best.seconds))
    steps = (
        Step("the fastest scheme everywhere", 0.031, 0.034, 0.04, 0.0008, 220_000_000, 0.61, False),
        Step("28 layers in int8-group64 instead", 0.0041, 0.0038, 0.006, 0.0008, 223_000_000, 0.66, False),
        Step("40 layers in int8-group64 instead", 0.0028, 0.0024, 0.004, 0.0007, 224_000_000, 0.69, True),
    )
    settings = {
        "rules": (Rule(None, "lm_head"), Rule("int8-group64", "*.down_proj"), Rule("int8-dynamic")),
        "verdict": "A mix of 4 schemes makes the model 2.40 times smaller and its layers 1.45 times faster here, "
        "for 0.24 % more perplexity: within the budget of 0.30 %.",
        "engine": "here",
        "objective": "time",
        "budget": 0.003,
        "met": True,
        "loss": compared.loss or 0.0,
        "increase": 0.0024,
        "error": 0.0007,
        "predicted": 0.0028,
        "divergence": 0.004,
        "bytes_before": 424_000_000,
        "bytes_after": 110_000_000,
        "seconds_before": 1.02,
        "seconds_after": 0.70,
        "steps": steps,
        "decisions": tuple(decisions),
        "costliest": tuple(d.layer for d in sorted(decisions, key=lambda d: -d.cost)[:3]),
    }
    return Choice(**{**settings, **changes})


def magnitudes(names, seed=0):
    """Weights as they are, inputs with heavier and heavier tails."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, name in enumerate(names):
        x = torch.randn(64, 576, generator=generator)
        x[:, :3] *= 1 + 30 * (index % 5)
        found.append(LayerMagnitudes(name, of(torch.randn(96, 576, generator=generator)), of(x)))
    return tuple(found)
