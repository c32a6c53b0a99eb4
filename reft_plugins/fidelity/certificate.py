"""The manifest of an export, `fidelity.json`: what was made of which adapter, and how close it is to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, computed_field

from reft_plugins.errors import DataError
from reft_plugins.fidelity.comparison import Fidelity
from reft_plugins.fidelity.evaluation import Evaluation
from reft_plugins.fidelity.records import Record
from reft_plugins.fidelity.texts import Text
from reft_plugins.manifest import BaseModelIdentity

SCHEMA: Literal["reft-export/1"] = "reft-export/1"
CERTIFICATE_FILE = "fidelity.json"

_SHA256 = r"^sha256:[0-9a-f]{64}$"


class AdapterFact(Record):
    """The adapter: the reference it was asked for by (of a folder only its name), its digest, and its method."""

    reference: str
    digest: str = Field(pattern=_SHA256)
    method: str


class NodeFact(Record):
    """A node of the adapter's program, how it was exported, and whether that is exact."""

    node: str
    exported_as: str
    exact: bool


class TextFact(Record):
    """Text of one source."""

    source: str
    texts: int
    tokens: int


class TextsFact(Record):
    """The text an export was fitted to (empty for exact ones) and measured on, and the seed of what was sampled.

    Attributes:
        files: digests of the user's own files by what they were for (`calibration`, `held_out`).
    """

    calibration: tuple[TextFact, ...] = ()
    held_out: tuple[TextFact, ...] = ()
    files: dict[str, str] = {}
    seed: int = 0


class FileFact(Record):
    """A file of the export.

    Attributes:
        dtype: number format of its matrices, None if it holds none.
        measured_in: what ran it: `transformers` (the parameters as rounded in the file) or `llama.cpp` (the file).
        evaluation: of this file, None where it was not measured.
    """

    name: str
    sha256: str = Field(pattern=_SHA256)
    size: int = Field(ge=0)
    dtype: str | None = None
    measured_in: str | None = None
    evaluation: Evaluation | None = None


class Certificate(Record):
    """Contents of `fidelity.json`.

    Attributes:
        kind: `exact` where the files can hold precisely what the adapter does, up to rounding, else `approximated`.
        strategy: how what is not exact was approximated; details: what the strategy has to say.
        exported_to: the form (`ollama`, `peft-lora`, …); producer: this package and its version.
        warnings: what differs or could be better, in sentences.
    """

    schema_: Literal["reft-export/1"] = Field(default=SCHEMA, alias="schema")
    producer: str
    exported_to: str
    kind: Literal["exact", "approximated"]
    strategy: str
    adapter: AdapterFact
    base: BaseModelIdentity
    nodes: tuple[NodeFact, ...]
    texts: TextsFact
    files: tuple[FileFact, ...]
    details: dict[str, Any] = {}
    warnings: tuple[str, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fidelity(self) -> Fidelity | None:
        """Of the first file that was measured."""
        measured = self.measured
        return measured[0][1].fidelity if measured else None

    @property
    def measured(self) -> list[tuple[FileFact, Evaluation]]:
        """Files with their evaluations, where they have one."""
        return [(file, file.evaluation) for file in self.files if file.evaluation is not None]

    def text(self) -> str:
        """The file's text; equal certificates have equal bytes."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"


def read_certificate(path: Path) -> Certificate:
    """Read `fidelity.json`, or that of a directory.

    Raises:
        DataError: it is missing, malformed, or of another schema.
    """
    path = path / CERTIFICATE_FILE if path.is_dir() else path
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the certificate of an export: {error}") from None
    return parse_certificate(text, str(path))


def parse_certificate(text: bytes, where: str) -> Certificate:
    """Read the UTF-8 text of a certificate; `where` is named in errors.

    Raises:
        DataError: it is malformed, or of another schema.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot read the certificate of an export: {error}") from None
    if isinstance(content, dict):
        content.pop("fidelity", None)
    try:
        return Certificate.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        raise DataError(f"{where}: not a certificate of schema {SCHEMA}: {field}: {first['msg']}") from None


def moved(certificate: Certificate, exported_to: str, names: Mapping[str, str]) -> Certificate:
    """The certificate of files that were renamed; those without a new name are left out."""
    files = tuple(
        file.model_copy(update={"name": names[file.name]}) for file in certificate.files if file.name in names
    )
    return certificate.model_copy(update={"exported_to": exported_to, "files": files})


def count_texts(texts: Iterable[Text]) -> tuple[TextFact, ...]:
    """Numbers of texts and tokens by source."""
    several, tokens = Counter[str](), Counter[str]()
    for text in texts:
        several[text.source] += 1
        tokens[text.source] += len(text.tokens)
    return tuple(TextFact(source=name, texts=several[name], tokens=tokens[name]) for name in sorted(several))


def reference_name(reference: str | Path | None) -> str:
    """What a certificate says of where an adapter came from: a reference as it is, of a folder its name alone."""
    if reference is None:
        return "an adapter in memory"
    text = str(reference)
    return Path(text).resolve().name if isinstance(reference, Path) or Path(text).exists() else text


def producer() -> str:
    """This package and its version."""
    try:
        return f"reft-plugins {version('reft-plugins')}"
    except PackageNotFoundError:
        return "reft-plugins"


def summary(evaluation: Evaluation | None) -> Sequence[str]:
    """An evaluation in two or three short lines, for comments in files."""
    if evaluation is None:
        return ("exact by construction, not measured",)
    fidelity, answers = evaluation.fidelity, evaluation.answers
    removed = fidelity.kl_removed
    lines = [
        f"fidelity on {fidelity.tokens} held-out predictions, against the adapter in transformers:",
        f"  top-1 agreement {fidelity.top1_agreement:.4f}, mean KL {fidelity.mean_kl:.2e} nats, "
        f"largest logit difference {fidelity.max_logit_difference:.2e}"
        + ("" if removed is None else f", {removed:.2%} of the KL from the base removed"),
    ]
    if answers is not None:
        lines.append(f"  {answers.identical:.1%} of {answers.prompts} greedy answers are identical")
    return tuple(lines)
