"""The certificate of an export: what became of each node, with which text, in which files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reft_ollama.weights.formats import FORMATS
from reft_plugins.fidelity.certificate import (
    AdapterFact,
    Certificate,
    FileFact,
    NodeFact,
    TextsFact,
    count_texts,
    producer,
    reference_name,
)
from reft_plugins.fidelity.records import plain
from reft_plugins.program import Edit, Node, VirtualTokens, WeightDelta
from reft_plugins.training.data import digest_of_file

if TYPE_CHECKING:
    from reft_ollama.job import Job
    from reft_ollama.writing import ModelFiles

FITTED = {
    "low-rank": "low-rank updates of the layer's output projections, fitted",
    "neurons": "additional MLP neurons",
    "distilled": "low-rank updates, fitted and distilled",
}
"""How a strategy writes what is not exact."""


def certify(
    job: Job,
    reference: str | Path | None,
    directory: Path,
    files: Sequence[ModelFiles],
    own_texts: Mapping[str, Path | None],
    seed: int,
) -> Certificate:
    """The certificate of an export whose files are complete.

    Args:
        reference: what the adapter was asked for by, None if it was given in memory.
        directory: where the files are now.
        own_texts: the user's files by what they were for.
    """
    texts = job.texts
    return Certificate(
        producer=producer(),
        exported_to="ollama",
        kind="exact" if job.plan.exact else "approximated",
        strategy=job.strategy,
        adapter=AdapterFact(
            reference=reference_name(reference), digest=job.adapter.digest, method=job.adapter.manifest.method
        ),
        base=job.identity,
        nodes=tuple(_fact(node, job) for node in job.program),
        texts=TextsFact(
            calibration=count_texts(texts.calibration if texts else ()),
            held_out=count_texts(texts.held_out if texts else ()),
            files={name: digest_of_file(path) for name, path in own_texts.items() if path is not None},
            seed=seed,
        ),
        files=tuple(_files(job, directory, files)),
        details=plain(job.details),
        warnings=tuple(job.warnings),
    )


def _fact(node: Node, job: Job) -> NodeFact:
    plan = job.plan
    if any(node is other for other in plan.remainder):
        return NodeFact(node=str(node), exported_as=FITTED.get(job.strategy, job.strategy), exact=False)
    if any(node is other for other in plan.widened):
        return NodeFact(node=str(node), exported_as="widened to all positions", exact=False)
    return NodeFact(node=str(node), exported_as=_exactly(node, job), exact=True)


def _exactly(node: Node, job: Job) -> str:
    if any(node is other for other in job.plan.on_prefix):
        return "what it makes of the template's constant beginning"
    if isinstance(node, VirtualTokens):
        return "tokens of the vocabulary, in front of every prompt"
    if isinstance(node, WeightDelta):
        return "merged into the weights"
    if isinstance(node, Edit) and node.site.layer in job.plan.constants:
        return "a vector, added by a layer of its own"
    return "merged into weights and biases"


def _files(job: Job, directory: Path, files: Sequence[ModelFiles]) -> Iterator[FileFact]:
    for each in files:
        evaluation = job.evaluations.get(each.dtype)
        runner = "transformers" if FORMATS[each.dtype].direct else "llama.cpp"
        model = _file(directory / each.gguf)
        yield model.model_copy(
            update={"dtype": each.dtype, "evaluation": evaluation, "measured_in": runner if evaluation else None}
        )
        yield _file(directory / each.modelfile)


def _file(path: Path) -> FileFact:
    return FileFact(name=path.name, sha256=digest_of_file(path), size=path.stat().st_size)
