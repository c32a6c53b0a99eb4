"""Adapters for the store's tests: real ones, and cheap variants of them that are different content."""

from __future__ import annotations

import json
import os
from pathlib import Path

from reft_plugins.fidelity.certificate import AdapterFact, Certificate, TextsFact
from reft_plugins.manifest import read_manifest, sha256


def make_adapter(directory: Path, seed: int, layers: int = 2, hidden_size: int = 16) -> Path:
    """A LoReFT adapter with random parameters, saved the way training saves it."""
    import torch

    from reft_plugins.adapter import Adapter
    from reft_plugins.manifest import BaseModelIdentity

    base = BaseModelIdentity(
        name="tiny-llama",
        architecture="LlamaForCausalLM",
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        fingerprint="sha256:" + "5" * 64,
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = {"rotate": (2, hidden_size), "weight": (2, hidden_size), "bias": (2,)}
    tensors = {
        f"layers.{layer}.block_output.0.{name}": torch.randn(shape, generator=generator)
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    adapter = Adapter.create("loreft", {"rank": 2, "positions": "f2+l2"}, tensors, base, notes={"seed": str(seed)})
    return adapter.save(directory)


def vary(source: Path, target: Path, note: str) -> Path:
    """The adapter in `source` with another note: other content for the store, made without torch."""
    target.mkdir(parents=True, exist_ok=True)
    manifest = json.loads((source / "adapter.json").read_text())
    manifest["notes"] = {"note": note}
    (target / "adapter.json").write_text(json.dumps(manifest))
    if not (target / "adapter.safetensors").exists():
        os.link(source / "adapter.safetensors", target / "adapter.safetensors")
    return target


def flip_bit(path: Path, position: int = -1) -> None:
    """Damage a file in place, even a read-only one, keeping its size."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def exact_certificate(adapter: Path) -> Certificate:
    """Of an export that changed nothing."""
    manifest = read_manifest(adapter)
    assert manifest.base is not None
    return Certificate(
        producer="reft-plugins 1",
        exported_to="ollama",
        kind="exact",
        strategy="exact",
        adapter=AdapterFact(reference="a:x", digest=sha256(manifest.to_json().encode()), method=manifest.method),
        base=manifest.base,
        nodes=(),
        texts=TextsFact(),
        files=(),
    )
