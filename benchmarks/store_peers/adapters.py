"""Adapters of two sizes, as training saves them, and many variants of them with other random numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from store_peers.plan import KINDS, MARK, sha256_of

SHAPES = {"tiny": (2, 64, 2), "large": (4, 4096, 4)}
"""Layers, hidden size and rank of a LoReFT adapter in float32: 4 KB with its manifest, and 0.5 MB."""


def make_pool(folder: Path, count: int) -> dict[str, int]:
    """`count` adapters of each kind as `folder/kind/number`.

    Returns:
        Bytes of an adapter of each kind.
    """
    for kind in KINDS:
        for number in range(count):
            vary(make_template(folder / f"{kind} template", kind), folder / kind / str(number), MARK)
    return {kind: sum(path.stat().st_size for path in (folder / kind / "0").iterdir()) for kind in KINDS}


def make_template(folder: Path, kind: str) -> Path:
    """A LoReFT adapter with random parameters; made once."""
    if folder.exists():
        return folder
    import torch

    from reft_plugins.adapter import Adapter
    from reft_plugins.manifest import BaseModelIdentity

    layers, hidden_size, rank = SHAPES[kind]
    base = BaseModelIdentity(
        name=f"llama-{hidden_size}",
        architecture="LlamaForCausalLM",
        hidden_size=hidden_size,
        num_hidden_layers=2 * layers,
        fingerprint="sha256:" + "5" * 64,
    )
    shapes = {"rotate": (rank, hidden_size), "weight": (rank, hidden_size), "bias": (rank,)}
    tensors = {
        f"layers.{layer}.block_output.0.{name}": torch.randn(shape, generator=torch.Generator().manual_seed(layer))
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    notes = {"note": MARK}
    return Adapter.create("loreft", {"rank": rank, "positions": "f7+l7"}, tensors, base, notes=notes).save(folder)


def vary(source: Path, target: Path, note: str) -> Path:
    """A copy of an adapter with another note and, at the end of its last tensor, other random bits."""
    target.mkdir(parents=True)
    data = bytearray((source / "adapter.safetensors").read_bytes())
    for low_bits in (slice(-8, -5), slice(-4, -1)):  # of two float32 numbers, which stay finite
        data[low_bits] = os.urandom(3)
    (target / "adapter.safetensors").write_bytes(data)
    manifest = json.loads((source / "adapter.json").read_text())
    manifest["notes"] = {"note": note}
    manifest["tensors"]["sha256"] = "sha256:" + sha256_of(target / "adapter.safetensors")
    (target / "adapter.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return target


def make_sources(folder: Path, pool: Path, count: int) -> list[tuple[str, str]]:
    """Adapter folders to be added and their kinds, a quarter of them large, all with different content."""
    kinds = [KINDS[number % 4 == 0] for number in range(count)]
    return [
        (str(vary(pool / kind / "0", folder / str(number), f"source {number}")), kind)
        for number, kind in enumerate(kinds)
    ]
