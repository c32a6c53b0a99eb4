"""Files for llama.cpp alone: a merged model without a Modelfile, or a small file beside a base model's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reft_ollama.architectures.base import Architecture
    from reft_ollama.export import ExportResult
    from reft_plugins.adapter import Adapter

SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A LoRA file or a control vector.

    Attributes:
        path: where it is; kind: `lora` or `control-vector`; architecture: llama.cpp's name for the base file's.
        tensors: how many of the base file's tensors, or of its layers, it changes.
    """

    path: Path
    kind: str
    architecture: str
    tensors: int

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "gguf": str(self.path),
            "kind": self.kind,
            "architecture": self.architecture,
            "tensors": self.tensors,
            "size": self.path.stat().st_size,
        }


def export_gguf(adapter: Adapter | str | Path, base: str | Path, out: str | Path, **settings: Any) -> ExportResult:
    """Export an adapter merged into its base model, as GGUF files without Modelfiles.

    Args:
        out: the file to write, if its name ends with `.gguf`, with its certificate in `NAME.fidelity.json`; else a
            directory for `model.gguf` and what goes with it.
        settings: of `reft_ollama.export.export_ollama`, which says what is raised; of several number formats each gets
            a file, so that `out` is a directory.

    Returns:
        As from there; `modelfile` is not there.
    """
    from reft_ollama.export import export_ollama
    from reft_ollama.writing import MODELFILE

    out = Path(out)
    dtype = settings.get("dtype", "f16")
    if out.suffix == SUFFIX and not isinstance(dtype, str) and len(dtype) > 1:
        raise ExportError(f"{out} is one file, but --dtype names {len(dtype)} formats. Give a directory as --out")
    parent = out.parent if out.suffix == SUFFIX else out
    made = parent / f".{out.name}.export"
    shutil.rmtree(made, ignore_errors=True)
    try:
        result = export_ollama(adapter, base, made, **settings)
        _certify_without_modelfiles(made, out)
        for path in sorted(made.iterdir(), key=lambda path: path.suffix == SUFFIX):
            if not path.name.startswith(MODELFILE):
                path.replace(_place(path, out))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return replace(result, directory=parent, gguf=_place(result.gguf, out))


def export_lora(adapter: Adapter | str | Path, base: str | Path, out: str | Path, *, dtype: str = "f32") -> SmallFile:
    """Export low-rank weight deltas as a LoRA file for llama.cpp (`--lora`), beside the base model's own file.

    Args:
        out: the file to write, or a directory for `lora.gguf`; dtype: `f32`, `f16` or `bf16`.

    Raises:
        UnsupportedProgramError: naming the node a LoRA file cannot hold.
        ExportError, AdapterError, BaseMismatchError: see `reft_plugins.load` and `reft_ollama.lora_gguf`.
    """
    from reft_ollama.lora_gguf import make_lora, write_lora

    loaded, architecture, config = _prepare(adapter, base)
    lora = make_lora(loaded.lower(), architecture, config)
    notes = _notes(loaded)
    with _written(Path(out), "lora.gguf") as (target, partial):
        write_lora(partial, lora, dtype=dtype, name=f"{notes['reft.base']}: {loaded.manifest.method}", notes=notes)
    return SmallFile(target, "lora", lora.architecture, len(lora.tensors))


def export_control_vector(adapter: Adapter | str | Path, base: str | Path, out: str | Path) -> SmallFile:
    """Export constant edits of layers' outputs as a control vector for llama.cpp (`--control-vector`).

    Args:
        out: the file to write, or a directory for `control-vector.gguf`.

    Raises:
        UnsupportedProgramError: naming the node a control vector cannot hold.
        ExportError, AdapterError, BaseMismatchError: see `reft_plugins.load`.
    """
    from reft_ollama.control_vector import make_control_vector, write_control_vector

    loaded, architecture, config = _prepare(adapter, base)
    vector = make_control_vector(loaded.lower(), architecture, config)
    with _written(Path(out), "control-vector.gguf") as (target, partial):
        write_control_vector(partial, vector, notes=_notes(loaded))
    return SmallFile(target, "control-vector", vector.architecture, len(vector.directions))


def _prepare(adapter: Adapter | str | Path, base: str | Path) -> tuple[Adapter, Architecture, PretrainedConfig]:
    from transformers import AutoConfig

    from reft_ollama.architectures.table import architecture_of
    from reft_plugins.api import load
    from reft_plugins.base_model import locate

    config = AutoConfig.from_pretrained(locate(base))
    architecture = architecture_of(config)
    return load(adapter, base=base), architecture, config


def _notes(adapter: Adapter) -> dict[str, str]:
    base = adapter.manifest.base
    return {"reft.adapter": adapter.digest, "reft.base": base.name if base else "unknown"}


@contextmanager
def _written(out: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """Where a file goes in the end, and where to write it until it is complete."""
    from reft_ollama.files import Staging

    target = out if out.suffix == SUFFIX else out / name
    with Staging(target.parent) as staging:
        yield target, staging.path(target.name)


def _certify_without_modelfiles(made: Path, out: Path) -> None:
    """Let the certificate of an export for Ollama, and the reports of it, speak of the files that stay."""
    from reft_ollama.writing import MODELFILE
    from reft_plugins.fidelity.certificate import read_certificate
    from reft_plugins.fidelity.report import HTML_FILE, documents

    certificate = read_certificate(made)
    files = tuple(
        fact.model_copy(update={"name": _place(made / fact.name, out).name})
        for fact in certificate.files
        if not fact.name.startswith(MODELFILE)
    )
    certificate = certificate.model_copy(update={"exported_to": "gguf", "files": files})
    for name, text in documents(certificate, (made / HTML_FILE).exists()).items():
        (made / name).write_text(text, "utf-8")


def _place(path: Path, out: Path) -> Path:
    """Where a file that an export made goes."""
    if out.suffix != SUFFIX:
        return out / path.name
    return out if path.suffix == SUFFIX else out.with_name(f"{out.stem}.{path.name}")
