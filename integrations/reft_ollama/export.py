"""The Ollama exporter: an adapter and its base model become a GGUF file and a Modelfile, with measured fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from reft_ollama.job import Job
    from reft_ollama.writing import ModelFiles
    from reft_plugins.adapter import Adapter
    from reft_plugins.fidelity.comparison import Fidelity
    from reft_plugins.fidelity.evaluation import Evaluation

STRATEGIES = ("auto", "low-rank", "distilled", "neurons")
"""How what weights cannot hold is written; see `export_ollama`."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 if unknown)."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A finished export.

    Attributes:
        directory: holds `gguf`, `modelfile`, `fidelity.json` and reports.
        fidelity: the exported weights, as rounded in the file, against the adapter in transformers on held-out text;
            None if it was not measured.
        kind: `exact` where weights can hold precisely what the adapter does, else `approximated`.
        strategy: `merged`, `low-rank`, `distilled` or `neurons`.
        sources: fidelity by source of the held-out text; both of the first number format.
        formats: everything that was measured, by number format.
        details: of the strategy: relative error per fitted layer, divergence by step of the distillation, or how much
            the model grew.
        warnings: what differs or could be better, in sentences.
    """

    directory: Path
    gguf: Path
    modelfile: Path
    fidelity: Fidelity | None
    kind: str
    strategy: str = "merged"
    sources: dict[str, Fidelity] = field(default_factory=dict)
    formats: dict[str, Evaluation] = field(default_factory=dict)
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
            "formats": {name: evaluation.to_json() for name, evaluation in self.formats.items()},
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
    distill: bool = False,
    rank: int | None = None,
    distill_steps: int = 200,
    dtype: str | Sequence[str] = "f16",
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    held_out: str | Path | None = None,
    system: str | None = None,
    create: str | None = None,
    ollama_quantize: str | None = None,
    host: str | None = None,
    min_top1: float = 0.9,
    measure: bool = True,
    report: bool = True,
    force: bool = False,
    seed: int = 0,
    progress: Progress = lambda step, done, total: None,
) -> ExportResult:
    """Export an adapter for Ollama.

    Weight changes, constant edits and edits of a linear module's output are merged and exact. What weights cannot hold
    is approximated:

    - `low-rank`: as updates of the touched layers' output projections, fitted on calibration text; keeps the model's
      size;
    - `distilled`: these and updates of every linear module behind them, trained to predict what the adapter predicts;
      keeps the model's size too, and takes minutes to hours;
    - `neurons`: affine edits of the residual stream at all positions (LoReFT, DiReFT, …) as extra MLP neurons, nearly
      exact on any text, which adds a few percent to the model;
    - `auto`: the first of `low-rank`, with `distill` also `distilled`, and where possible `neurons` that reaches the
      targets of `reft_plugins.fidelity.comparison` on every source of held-out text, else the closest of them.

    Args:
        adapter: Adapter, directory or reference; base: folder or hub id; out: directory to write to.
        approximate: widen nodes that work at some positions to all of them, and measure what that costs.
        rank: of fitted updates; by default that of the edits, or 32; distill_steps: of the distillation. Ctrl-C ends it
            with the best so far.
        dtype: number format of the matrices, a name of `reft_ollama.weights.formats.FORMATS`; or several, of which the
            first becomes `model.gguf` with `Modelfile`, each further one `model-<dtype>.gguf` with `Modelfile-<dtype>`.
        calibration, held_out: JSONL with prompt and completion, or plain text; the former is also measured on (a tenth
            of it, held out) if the latter is not given.
        calibration_tokens: how many to fit on; by default ten per neuron of an MLP, at least 20,000.
        system: the system message of conversations without one, instead of the chat template's own.
        create: name under which to create the model in a running Ollama at `host` (default: `OLLAMA_HOST`).
        ollama_quantize: number format that Ollama is asked to convert the file to then, such as `q4_K_M`.
        min_top1: fail if a file has a lower top-1 agreement, unless `force`.
        measure: False writes an exact export without running the model, which then need not fit into memory.
        report: also write the certificate for people, `report.md` and `report.html`.
        seed: of sampled text; equal arguments give equal files.

    Raises:
        UnsupportedProgramError: naming a node weights cannot hold, and the way out.
        ExportError: the export would not be faithful, or the base model cannot be written.
        BaseMismatchError, AdapterError, UnknownReferenceError, DataError: see `reft_plugins.load`.
    """
    from reft_ollama.candidates import Fitting
    from reft_ollama.certifying import certify
    from reft_ollama.client.creation import check_server, create_model
    from reft_ollama.files import Staging
    from reft_ollama.job import Job
    from reft_ollama.writing import all_names, model_files, write_ggufs
    from reft_plugins.adapter import Adapter
    from reft_plugins.api import load
    from reft_plugins.fidelity.report import DOCUMENTS, documents
    from reft_plugins.fidelity.text_files import check_readable
    from reft_plugins.references import resolve

    if strategy not in STRATEGIES:
        raise ExportError(f"strategy is one of {', '.join(STRATEGIES)}")
    files = model_files([dtype] if isinstance(dtype, str) else list(dtype))
    own_texts = {
        "calibration": None if calibration is None else Path(calibration),
        "held_out": None if held_out is None else Path(held_out),
    }
    check_readable({f"{name.replace('_', '-')} file": path for name, path in own_texts.items()})
    if create is not None:
        check_server(create, host)
    job = Job.prepare(load(adapter, base=base), base, approximate, progress)
    job.system, job.adapter_folder = system, None if isinstance(adapter, Adapter) else resolve(adapter)
    job.warnings += job.modelfile(files[0].gguf, files[0].dtype).problems()
    ggufs, modelfiles = all_names()
    speaking = [*DOCUMENTS, *modelfiles]
    with Staging(Path(out), replaces=[*ggufs, *speaking], last=speaking) as staging, closing(job):
        if measure:
            runtime = plugins.runtimes.get("transformers")(base, dtype="float32")
            try:
                job.choose_weights(
                    runtime,
                    fitting=Fitting(strategy, distill, rank, distill_steps, seed),
                    dtypes=[each.dtype for each in files],
                    calibration_tokens=calibration_tokens,
                    **own_texts,
                )
            finally:
                runtime.close()
            _check(job, min_top1, force)
        else:
            job.take_exact_weights()
        write_ggufs(job, staging, files)
        job.measure_files({each.dtype: staging.path(each.gguf) for each in files})
        _check(job, min_top1, force)
        job.judge()
        for each in files:
            staging.path(each.modelfile).write_text(job.modelfile(each.gguf, each.dtype).text(), "utf-8")
        asked_for = None if isinstance(adapter, Adapter) else adapter
        certificate = certify(job, asked_for, staging.path(""), files, own_texts, seed)
        for name, text in documents(certificate, report).items():
            staging.path(name).write_text(text, "utf-8")
        result = _result(job, staging.directory, files)
    if create is None:
        return result
    modelfile = job.modelfile(files[0].gguf, files[0].dtype)
    shown = create_model(create, result.gguf, modelfile, host=host, quantize=ollama_quantize, progress=progress)
    return replace(result, warnings=(*result.warnings, *shown))


def _check(job: Job, min_top1: float, force: bool) -> None:
    from reft_ollama.measuring import check_fidelity

    for dtype, evaluation in job.evaluations.items():
        check_fidelity(evaluation, dtype, 0.0 if force else min_top1, job.plan.exact)


def _result(job: Job, out: Path, files: Sequence[ModelFiles]) -> ExportResult:
    first = job.evaluations.get(files[0].dtype)
    return ExportResult(
        directory=out,
        gguf=out / files[0].gguf,
        modelfile=out / files[0].modelfile,
        fidelity=None if first is None else first.fidelity,
        kind="exact" if job.plan.exact else "approximated",
        strategy=job.strategy,
        sources={} if first is None else first.sources,
        formats={each.dtype: job.evaluations[each.dtype] for each in files if each.dtype in job.evaluations},
        details=job.details,
        warnings=tuple(job.warnings),
    )
