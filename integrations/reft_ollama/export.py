"""The Ollama exporter: an adapter and its base model become a GGUF file and a Modelfile, with measured fidelity."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from reft_ollama.files import Staging
    from reft_ollama.job import Job
    from reft_ollama.writing import ModelFiles
    from reft_plugins.adapter import Adapter
    from reft_plugins.fidelity.comparison import Fidelity

FIDELITY_FILE = "fidelity.json"

STRATEGIES = ("auto", "low-rank", "neurons")
"""How affine edits of the residual stream are written; see `export_ollama`."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 if unknown)."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A finished export.

    Attributes:
        directory: holds `gguf`, `modelfile` and `fidelity.json`.
        fidelity: the exported weights, as rounded in the file, against the adapter in transformers on held-out text;
            None if it was not measured.
        kind: `exact` where weights can hold precisely what the adapter does, else `approximated`.
        strategy: `merged`, `low-rank` or `neurons`.
        sources: fidelity by source of the held-out text.
        details: of the strategy: relative error per fitted layer, or how much the model grew.
        warnings: what differs or could be better, in sentences.
    """

    directory: Path
    gguf: Path
    modelfile: Path
    fidelity: Fidelity | None
    kind: str
    strategy: str = "merged"
    sources: dict[str, Fidelity] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "directory": str(self.directory),
            "gguf": str(self.gguf),
            "modelfile": str(self.modelfile),
            "kind": self.kind,
            "strategy": self.strategy,
            "fidelity": None if self.fidelity is None else self.fidelity.to_json(),
            "sources": {name: fidelity.to_json() for name, fidelity in self.sources.items()},
            "details": self.details,
            "warnings": list(self.warnings),
        }


def export_ollama(
    adapter: Adapter | str | Path,
    base: str | Path,
    out: str | Path,
    *,
    approximate: bool = False,
    strategy: str = "auto",
    dtype: str | Sequence[str] = "f16",
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    held_out: str | Path | None = None,
    create: str | None = None,
    ollama_quantize: str | None = None,
    host: str | None = None,
    min_top1: float = 0.9,
    measure: bool = True,
    force: bool = False,
    seed: int = 0,
    progress: Progress = lambda step, done, total: None,
) -> ExportResult:
    """Export an adapter for Ollama.

    Weight changes, constant edits and edits of a linear module's output are merged and exact. Affine edits of the
    residual stream at all positions (LoReFT, DiReFT, …) are approximated: with `low-rank` as an update of `down_proj`
    fitted on calibration text, which keeps the model's size; with `neurons` as extra MLP neurons, which is nearly exact
    on any text but adds a few percent to it; with `auto` as the first of the two that reaches the targets of
    `reft_plugins.fidelity.comparison` on every source of held-out text.

    Args:
        adapter: Adapter, directory or reference; base: folder or hub id; out: directory to write to.
        approximate: widen nodes that work at some positions to all of them, and measure what that costs.
        dtype: number format of the matrices, a name of `reft_ollama.weights.formats.FORMATS`; or several, of which the
            first becomes `model.gguf` with `Modelfile`, each further one `model-<dtype>.gguf` with `Modelfile-<dtype>`.
        calibration, held_out: JSONL with prompt and completion, or plain text; the former is also measured on (a tenth
            of it, held out) if the latter is not given.
        calibration_tokens: how many to fit on; by default ten per neuron of an MLP, at least 20,000.
        create: name under which to create the model in a running Ollama at `host` (default: `OLLAMA_HOST`).
        ollama_quantize: number format that Ollama is asked to convert the file to then, such as `q4_K_M`.
        min_top1: fail below this top-1 agreement, unless `force`.
        measure: False writes an exact export without running the model, which then need not fit into memory.
        seed: of sampled text; equal arguments give equal files.

    Raises:
        UnsupportedProgramError: naming a node weights cannot hold, and the way out.
        ExportError: the export would not be faithful, or the base model cannot be written.
        BaseMismatchError, AdapterError, UnknownReferenceError, DataError: see `reft_plugins.load`.
    """
    from reft_ollama.client.creation import check_server, create_model
    from reft_ollama.files import Staging
    from reft_ollama.job import Job
    from reft_ollama.writing import all_names, model_files, write_ggufs
    from reft_plugins.api import load

    if strategy not in STRATEGIES:
        raise ExportError(f"strategy is one of {', '.join(STRATEGIES)}")
    files = model_files([dtype] if isinstance(dtype, str) else list(dtype))
    if create is not None:
        check_server(create, host)
    job = Job.prepare(load(adapter, base=base), base, approximate, progress)
    ggufs, modelfiles = all_names()
    with Staging(
        Path(out), replaces=[*ggufs, *modelfiles, FIDELITY_FILE], last=[FIDELITY_FILE, *modelfiles]
    ) as staging:
        if measure:
            runtime = plugins.runtimes.get("transformers")(base, dtype="float32")
            try:
                job.choose_weights(
                    runtime,
                    strategy=strategy,
                    dtype=files[0].dtype,
                    calibration=None if calibration is None else Path(calibration),
                    calibration_tokens=calibration_tokens,
                    held_out=None if held_out is None else Path(held_out),
                    seed=seed,
                )
            finally:
                runtime.close()
            _check(job.fidelity, min_top1, force)
        else:
            job.take_exact_weights()
        write_ggufs(job, staging, files)
        result = _write_texts(job, staging, files)
    if create is None:
        return result
    shown = create_model(
        create, result.gguf, job.modelfile(files[0].gguf), host=host, quantize=ollama_quantize, progress=progress
    )
    return replace(result, warnings=(*result.warnings, *shown))


def _check(fidelity: Fidelity, min_top1: float, force: bool) -> None:
    if fidelity.top1_agreement < min_top1 and not force:
        raise ExportError(
            f"the exported model would choose another token than the adapter in "
            f"{1 - fidelity.top1_agreement:.1%} of {fidelity.tokens} held-out predictions (top-1 agreement "
            f"{fidelity.top1_agreement:.3f}, at least {min_top1} is asked for; mean KL {fidelity.mean_kl:.4f} nats). "
            "Nothing was written. Serve the adapter with vLLM (reft serve), which runs it as it is; calibrate on text "
            "of its task (--calibration); or write it nevertheless with --force"
        )


def _write_texts(job: Job, staging: Staging, files: Sequence[ModelFiles]) -> ExportResult:
    """Write what goes with the GGUF files: the Modelfiles and the fidelity."""
    out = staging.directory
    measured = job.measured
    result = ExportResult(
        directory=out,
        gguf=out / files[0].gguf,
        modelfile=out / files[0].modelfile,
        fidelity=job.fidelity if measured else None,
        kind="exact" if job.plan.exact else "approximated",
        strategy=job.strategy,
        sources=dict(job.evaluation.sources) if measured else {},
        details=job.details,
        warnings=tuple(job.warnings),
    )
    document = {name: value for name, value in result.to_json().items() if name in _FIDELITY_KEYS}
    staging.path(FIDELITY_FILE).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    for each in files:
        staging.path(each.modelfile).write_text(job.modelfile(each.gguf).text(), "utf-8")
    return result


_FIDELITY_KEYS = ("kind", "strategy", "fidelity", "sources", "details", "warnings")
