"""`reft inspect`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reft_plugins.cli.completion import references
from reft_plugins.errors import AdapterError

if TYPE_CHECKING:
    from reft_plugins.manifest import Manifest


@click.command("inspect")
@click.argument("reference", shell_complete=references)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(reference: str, as_json: bool) -> None:
    """Show what an adapter is: method, base model, sites, size, training. Checks the digest of its tensors.

    Example: reft inspect sentiment:latest
    """
    from reft_plugins.manifest import MANIFEST_FILE, read_manifest
    from reft_plugins.references import resolve

    directory = resolve(reference)
    if not (directory / MANIFEST_FILE).is_file():
        raise AdapterError(f"{directory}: no {MANIFEST_FILE}; read other libraries' checkpoints by `reft import`")
    manifest = read_manifest(directory)
    shapes = _shapes(directory, manifest)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    if as_json:
        found = {
            "manifest": manifest.document(),
            "parameters": parameters,
            "shapes": shapes,
        }
        click.echo(json.dumps(found, indent=2))
        return
    for name, text in _lines(manifest, parameters):
        click.echo(f"{name:12} {text}")


def _shapes(directory: Path, manifest: Manifest) -> dict[str, list[int]]:
    """Shapes by tensor name, from a file whose digest is the manifest's."""
    import hashlib

    from safetensors import SafetensorError, safe_open

    from reft_plugins.manifest import TENSORS_FILE

    path = directory / TENSORS_FILE
    try:
        with path.open("rb") as file:
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        if digest != manifest.tensors.sha256:
            raise AdapterError(
                f"{path}: digest differs from the manifest, so it is truncated or altered. Copy it again"
            )
        with safe_open(path, framework="numpy") as tensors:
            return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot read the tensors: {error}") from None


def _lines(manifest: Manifest, parameters: int) -> list[tuple[str, str]]:
    base, facts, training = manifest.base, manifest.program, manifest.training
    settings = ", ".join(f"{name}={value}" for name, value in sorted(manifest.config.items()))
    lines = [("method", f"{manifest.method} ({settings})")]
    if base is None:
        lines.append(("base", "unknown: import it again with --base"))
    else:
        sizes = f"{base.architecture}, {base.num_hidden_layers} layers of {base.hidden_size}"
        lines.append(("base", f"{base.name} ({sizes}, {base.fingerprint})"))
    lines.append(("parameters", f"{parameters:,} ({manifest.tensors.size:,} bytes)"))
    lines += [("edit", f"layer {e.layer} {e.component}, positions {e.positions}, rank {e.rank}") for e in facts.edits]
    lines += [("weights", f"{d.module}, rank {d.rank}") for d in facts.weight_deltas]
    lines += [("node", node) for node in facts.other_nodes]
    if training is not None:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(training.metrics.items()))
        lines.append(("training", f"{training.steps} steps on {training.examples} examples, seed {training.seed}"))
        lines += [("data", training.data_sha256), ("metrics", metrics)]
    lines += [(parent.relation, f"{parent.source} {parent.digest or ''}".rstrip()) for parent in manifest.parents]
    lines += sorted(manifest.notes.items())
    return lines
