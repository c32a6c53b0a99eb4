"""Every adapter of a store for one base model, a folder each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.base_model import identify
from reft_plugins.errors import ReftError
from reft_plugins.fidelity.certificate import Certificate, producer, read_certificate
from reft_plugins.manifest import read_manifest, sha256
from reft_plugins.references import list_references, resolve

if TYPE_CHECKING:
    from reft_ollama.export import ExportResult, Progress

RECEIPT_FILE = "export.json"
"""What an export in a folder was made of, so that it is not made again."""

EXPORTED, THERE, FAILED = "exported", "already there", "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one adapter.

    Attributes:
        reference: `name:tag`; directory: where its export is, or would be.
        outcome: `exported`, `already there` or `failed`.
        certificate: of the export that is there; warnings: of one made now; error: why there is none.
    """

    reference: str
    directory: Path
    outcome: str
    certificate: Certificate | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, of the certificate what matters most."""
        certificate = self.certificate
        fidelity = None if certificate is None else certificate.fidelity
        return {
            "reference": self.reference,
            "directory": str(self.directory),
            "outcome": self.outcome,
            "kind": None if certificate is None else certificate.kind,
            "strategy": None if certificate is None else certificate.strategy,
            "fidelity": None if fidelity is None else fidelity.to_json(),
            "warnings": list(self.warnings),
            "error": self.error,
        }


def export_all(
    base: str | Path,
    out: str | Path,
    name: str | None = None,
    *,
    again: bool = False,
    progress: Callable[[str], Progress] = lambda reference: lambda step, done, total: None,
    **settings: Any,
) -> Iterator[Outcome]:
    """Export every tag of every adapter that was made for a base model, one after another, whatever fails.

    The export of `name:tag` is in `out/name/tag`. It is made again only if the adapter behind the tag, the base model,
    a setting, a file that a setting names, or this package has changed, or a file of it is missing.

    Args:
        base: folder or hub id; name: only the tags of this adapter.
        again: make all of them again.
        progress: asked for a progress function per reference.
        settings: of `reft_ollama.export.export_ollama`.

    Raises:
        UnknownReferenceError: there is nothing to export; BaseModelError, StoreError: the base or the store cannot be
            read. What goes wrong with one adapter is in its outcome.
    """
    identity = identify(base)
    facts = {"base": identity.fingerprint, "settings": _plain(settings), "producer": producer()}
    for reference in list_references(name):
        directory = Path(out).joinpath(*reference.replace(":", "/").split("/"))
        try:
            source = resolve(reference)
            manifest = read_manifest(source)
            if manifest.base is not None and manifest.base.fingerprint != identity.fingerprint:
                continue
            receipt = {"adapter": _digest(source), **facts}
            if not again and _is_there(directory, receipt):
                yield Outcome(reference, directory, THERE, read_certificate(directory))
                continue
            (directory / RECEIPT_FILE).unlink(missing_ok=True)
            result = _export(reference, base, directory, progress(reference), settings)
            sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
            (directory / RECEIPT_FILE).write_text(json.dumps({**receipt, "files": sizes}, indent=2) + "\n", "utf-8")
            certificate = read_certificate(directory)
        except (ReftError, OSError, ValueError, RuntimeError, MemoryError) as error:
            yield Outcome(reference, directory, FAILED, error=str(error) or type(error).__name__)
        else:
            yield Outcome(reference, directory, EXPORTED, certificate, result.warnings)


def _export(
    reference: str, base: str | Path, directory: Path, progress: Progress, settings: Mapping[str, Any]
) -> ExportResult:
    from reft_ollama.export import export_ollama

    return export_ollama(reference, base, directory, progress=progress, **settings)


def _digest(source: Path) -> str:
    from reft_plugins.adapter import Adapter

    return Adapter.load(source).digest


def _is_there(directory: Path, receipt: Mapping[str, Any]) -> bool:
    """Whether a folder holds the export that this receipt would be for."""
    try:
        found = json.loads((directory / RECEIPT_FILE).read_text("utf-8"))
        sizes = found.pop("files")
        return bool(found == receipt) and all((directory / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON; a file is what is in it."""
    read = {name: sha256(v.read_bytes()) if isinstance(v, Path) and v.is_file() else v for name, v in settings.items()}
    plain: dict[str, Any] = json.loads(json.dumps(read, default=str))
    return plain
