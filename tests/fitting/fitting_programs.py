"""Nodes of every kind that a fit approximates, each strong enough to change many predictions of the tiny Llama."""

from __future__ import annotations

import torch

from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Node, Site

ALL = Positions.parse("all")


def random(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def low_rank(seed: int, rank: int = 4, scale: float = 0.17, width: int = 128) -> dict[str, torch.Tensor]:
    down, up = random(seed, rank, width, scale=scale), random(seed + 1, rank, width, scale=scale)
    return {"down": down, "up": up, "bias": random(seed + 2, rank)}


PROGRAMS: dict[str, list[Node]] = {
    "affine edits": [Edit(Site(layer), ALL, **low_rank(layer)) for layer in (1, 2)],
    "bottleneck": [Edit(Site(layer), ALL, **low_rank(layer, 8), activation="relu") for layer in (1, 2)],
    "parallel bottleneck": [
        Edit(Site(layer, "mlp_output"), ALL, **low_rank(layer, 8), activation="gelu", reads="mlp_residual")
        for layer in (1, 2)
    ],
    "bottleneck of attention": [
        Edit(Site(layer, "attention_output"), ALL, **low_rank(layer, 8, 0.5), activation="relu") for layer in (1, 2)
    ],
    "prefix": [
        KeyValuePrefix(layer, random(layer, 4, 2, 32, scale=2.0), random(layer + 9, 4, 2, 32, scale=4.0))
        for layer in (1, 2)
    ],
    "gated prefix": [
        KeyValuePrefix(layer, random(layer, 4, 2, 32), random(layer + 9, 4, 2, 32, scale=4.0), gate=torch.tensor([0.7]))
        for layer in (1, 2)
    ],
}
