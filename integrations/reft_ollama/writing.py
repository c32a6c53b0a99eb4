"""Writing an export's GGUF files, one for each number format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reft_ollama.files import Staging
from reft_ollama.weights.formats import FORMATS
from reft_ollama.weights.gguf_file import GgufFile
from reft_ollama.weights.quantization import check_quantiser, quantise
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from reft_ollama.job import Job

GGUF_FILE, MODELFILE = "model.gguf", "Modelfile"

SOURCES = ("f32", "f16", "bf16")
"""What llama.cpp's quantiser reads, the best first."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Names of a GGUF file of one number format and of its Modelfile."""

    dtype: str
    gguf: str
    modelfile: str


def model_files(dtypes: Sequence[str]) -> list[ModelFiles]:
    """Names by number format, the first of which has the plain ones.

    Raises:
        ExportError: an unknown format, one given twice, or one that llama.cpp's quantiser is missing for.
    """
    if not dtypes or len(set(dtypes)) < len(dtypes):
        raise ExportError(f"--dtype {' '.join(dtypes)}: at least one number format, and each of them once")
    for dtype in dtypes:
        if dtype not in FORMATS:
            raise ExportError(f"--dtype {dtype}: there is no such number format; there are {', '.join(FORMATS)}")
        if not FORMATS[dtype].direct:
            check_quantiser(dtype)
    return [ModelFiles(dtypes[0], GGUF_FILE, MODELFILE), *(_further(dtype) for dtype in dtypes[1:])]


def all_names() -> tuple[list[str], list[str]]:
    """Every name an export may have given a GGUF file and a Modelfile."""
    further = [_further(dtype) for dtype in FORMATS]
    return [GGUF_FILE, *(files.gguf for files in further)], [MODELFILE, *(files.modelfile for files in further)]


def write_ggufs(job: Job, staging: Staging, files: Sequence[ModelFiles]) -> None:
    """Write all GGUF files; what llama.cpp's quantiser reads is written first, and removed if nobody asked for it.

    Raises:
        ExportError: see `GgufFile`, `quantise` and `Staging.require`.
    """
    notes = {"reft.adapter": job.adapter.digest, "reft.base": job.base_name, "reft.strategy": job.strategy}
    quantised = [each for each in files if not FORMATS[each.dtype].direct]
    direct = {each.dtype: staging.path(each.gguf) for each in files if FORMATS[each.dtype].direct}
    source = next((dtype for dtype in SOURCES if dtype in direct), None)
    temporary = None
    if quantised and source is None:
        source, temporary = "f16", staging.path("source.gguf")
        direct["f16"] = temporary
    made = {
        dtype: GgufFile(job.weights, job.architecture, job.prompts.tokenizer, dtype=dtype, name=job.name, notes=notes)
        for dtype in direct
    }
    full = GgufFile(job.weights, job.architecture, job.prompts.tokenizer, dtype="f16").tensor_bytes
    staging.require(
        sum(file.tensor_bytes for file in made.values())
        + sum(int(full * FORMATS[each.dtype].share_of_f16) for each in quantised)
    )
    for dtype, file in made.items():
        step = f"Writing {dtype}"
        file.write(direct[dtype], lambda done, total, step=step: job.progress(step, done, total))  # type: ignore[misc]
    for each in quantised:
        assert source is not None
        job.progress(f"Quantising to {each.dtype}", 0, 0)
        warnings = quantise(direct[source], staging.path(each.gguf), each.dtype, torch.get_num_threads())
        job.warnings += [warning for warning in warnings if warning not in job.warnings]
    if temporary is not None:
        temporary.unlink()


def _further(dtype: str) -> ModelFiles:
    return ModelFiles(dtype, f"model-{dtype}.gguf", f"{MODELFILE}-{dtype}")
