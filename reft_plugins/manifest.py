"""The manifest `adapter.json`: what an adapter is, on which base model it runs, and where it came from.

This module imports neither torch nor any runtime, so that schedulers, stores and command lines can read manifests.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reft_plugins import limits, strict_json
from reft_plugins.errors import AdapterError
from reft_plugins.positions import Positions

MANIFEST_FILE = "adapter.json"
TENSORS_FILE = "adapter.safetensors"
MAX_MANIFEST_BYTES = limits.MAX_MANIFEST_BYTES
SCHEMA: Literal["reft-adapter/1"] = "reft-adapter/1"

_SHA256 = r"^sha256:[0-9a-f]{64}$"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseModelIdentity(_Record):
    """Which base model an adapter belongs to; see `reft_plugins.base_model.identify` for the fingerprint."""

    name: str
    revision: str | None = None
    architecture: str
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    fingerprint: str = Field(pattern=_SHA256)


class EditFact(_Record):
    """Where one `Edit` of the program works; `positions` is its canonical specification."""

    layer: int = Field(ge=0)
    component: str
    positions: str
    rank: int = Field(ge=0)
    simultaneous: bool = False


class WeightDeltaFact(_Record):
    """Which module one `WeightDelta` of the program changes, and on which tokens."""

    module: str
    rank: int = Field(ge=0)
    positions: str = "all"
    replaces: bool = False


class ProgramFacts(_Record):
    """Summary of the lowered program, for whoever must not load tensors (schedulers, listings)."""

    edits: tuple[EditFact, ...] = ()
    weight_deltas: tuple[WeightDeltaFact, ...] = ()
    other_nodes: tuple[str, ...] = ()


class TensorsFact(_Record):
    """Digest and size of `adapter.safetensors`."""

    sha256: str = Field(pattern=_SHA256)
    size: int = Field(ge=0)


class TrainingRecord(_Record):
    """Provenance of trained parameters. Losses are mean cross-entropy per completion token, in nats."""

    data_sha256: str = Field(pattern=_SHA256)
    examples: int
    seed: int
    steps: int
    epochs: float
    arguments: dict[str, Any] = {}
    metrics: dict[str, float] = {}


class TaskFact(_Record):
    """What the base model is used for, where that is not to go on with a text.

    `labels` are the names of a classifier's outputs, in order.
    """

    name: Literal["sequence_classification"]
    labels: tuple[str, ...] = Field(min_length=2)


class Parent(_Record):
    """What this adapter was made from: `relation` is `imported`, `composed`, `converted`, …"""

    relation: str
    source: str
    digest: str | None = None


class Manifest(_Record):
    """Contents of `adapter.json`."""

    schema_: Literal["reft-adapter/1"] = Field(default=SCHEMA, alias="schema")
    method: str
    config: dict[str, Any] = {}
    base: BaseModelIdentity | None
    program: ProgramFacts
    tensors: TensorsFact
    training: TrainingRecord | None = None
    parents: tuple[Parent, ...] = ()
    notes: dict[str, str] = {}
    task: TaskFact | None = None

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    def document(self) -> dict[str, Any]:
        """What `adapter.json` holds. Facts of later versions are left out where they say nothing, so that manifests
        written before keep their bytes and digests.
        """
        document = self.model_dump(by_alias=True, mode="json", exclude={"task"} if self.task is None else None)
        for fact in document["program"]["weight_deltas"]:
            if not fact["replaces"]:
                del fact["replaces"]
        return document

    def to_json(self) -> str:
        """Canonical text: sorted keys, so equal manifests have equal bytes and digests."""
        return json.dumps(self.document(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def positions(self) -> tuple[Positions, ...]:
        """The distinct positions of all edits, in program order."""
        return tuple(Positions.parse(spec) for spec in dict.fromkeys(edit.positions for edit in self.program.edits))


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Read a manifest strictly.

    Args:
        text: UTF-8 JSON; where: named in errors, for example the file's path.

    Raises:
        AdapterError: on oversized, malformed or duplicate-keyed JSON, an unknown schema, or wrong fields.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise AdapterError(f"{where}: a manifest of {len(text)} bytes exceeds the limit of {MAX_MANIFEST_BYTES}")
    try:
        document = strict_json.loads(text)
    except ValueError as error:
        raise AdapterError(f"{where}: not a readable manifest: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise AdapterError(
            f"{where}: unknown schema {schema!r}; this version reads {SCHEMA!r}. "
            "Upgrade reft-plugins, or import the adapter again from its original files"
        )
    try:
        manifest = Manifest.model_validate(document)
        for spec in (
            fact.positions for facts in (manifest.program.edits, manifest.program.weight_deltas) for fact in facts
        ):
            Positions.parse(spec)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise AdapterError(f"{where}: field {field!r}: {first['msg']}") from None
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from None
    return manifest


def read_manifest(directory: Path | str) -> Manifest:
    """Read `adapter.json` of an adapter directory.

    Raises:
        AdapterError: when it is missing or cannot be trusted; see `parse_manifest`.
    """
    path = Path(directory) / MANIFEST_FILE
    return parse_manifest(read_bounded(path), str(path))


def read_bounded(path: Path) -> bytes:
    """The bytes of a manifest file, at most one more than allowed, so that a huge file is refused and never held."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise AdapterError(f"{path}: cannot read the manifest: {error.strerror}") from None


def sha256(data: bytes) -> str:
    """Digest of some bytes in the form used throughout: `sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
