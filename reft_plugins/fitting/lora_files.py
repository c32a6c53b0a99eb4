"""The directory of a converted LoRA: PEFT's files and the certificate beside them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError
from reft_plugins.fidelity.certificate import (
    CERTIFICATE_FILE,
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
from reft_plugins.fitting.as_lora import LoraConversion
from reft_plugins.fitting.lora_plan import EXACT
from reft_plugins.program import Node, WeightDelta
from reft_plugins.training.data import digest_of_file

_FITTED = {
    "factors": "factors",
    "fitted": "low-rank updates of the output projections of its layer, fitted",
    "distilled": "low-rank updates, fitted and distilled",
}


def write_lora(
    conversion: LoraConversion, out: Path, reference: str | Path | None = None
) -> tuple[Certificate, list[str]]:
    """Write `adapter_config.json`, `adapter_model.safetensors` and `fidelity.json`, all or nothing.

    Args:
        out: a new directory, or an empty one.
        reference: what the adapter was asked for by.

    Returns:
        the certificate, and what PEFT's files do not say.

    Raises:
        AdapterError: the adapter changes nothing.
    """
    lora = lora_adapter(conversion)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        unsaid = plugins.formats.get("peft").write(lora, partial, conversion.base)
        certificate = _certify(conversion, partial, reference)
        (partial / CERTIFICATE_FILE).write_text(certificate.text(), "utf-8")
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return certificate, unsaid


def lora_adapter(conversion: LoraConversion) -> Adapter:
    """The conversion as an adapter of method `lora`, scaled by one.

    Raises:
        AdapterError: it changes nothing.
    """
    updates = conversion.updates
    if not updates:
        raise AdapterError("the adapter changes nothing that a LoRA could hold, so there is nothing to write")
    ranks = {module: len(update.right) for module, update in updates.items()}
    largest = max(ranks.values())
    tensors = {
        f"{module}.{name}": tensor
        for module, update in updates.items()
        for name, tensor in (("lora_A", update.right), ("lora_B", update.left))
    }
    patterns: dict[str, Any] = {
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != largest},
        "alpha_pattern": {module: float(rank) for module, rank in ranks.items() if rank != largest},
    }
    config = {"rank": largest, "alpha": float(largest), **patterns}
    return Adapter.create("lora", config, tensors, conversion.base.identity)


def _certify(conversion: LoraConversion, directory: Path, reference: str | Path | None) -> Certificate:
    plan, texts, adapter = conversion.plan, conversion.texts, conversion.adapter
    ranks = {module: len(update.right) for module, update in conversion.updates.items()}
    details = {"ranks": ranks, "lost": conversion.lost, **conversion.details}
    return Certificate(
        producer=producer(),
        exported_to="peft-lora",
        kind="exact" if conversion.exact else "approximated",
        strategy=conversion.strategy,
        adapter=AdapterFact(reference=reference_name(reference), digest=adapter.digest, method=adapter.manifest.method),
        base=conversion.base.identity,
        nodes=tuple(_fact(own, node, conversion) for own, node in zip(plan.program, plan.nodes, strict=True)),
        texts=TextsFact(
            calibration=count_texts(texts.calibration),
            held_out=count_texts(texts.held_out),
            files={name: digest_of_file(path) for name, path in conversion.own_texts.items() if path is not None},
            seed=conversion.seed,
        ),
        files=tuple(_file(path, conversion) for path in sorted(directory.iterdir())),
        details=plain(details),
        warnings=tuple(conversion.warnings),
    )


def _fact(own: Node, node: Node, conversion: LoraConversion) -> NodeFact:
    widened = "" if own is node else ", at all positions"
    if not isinstance(node, WeightDelta) or node in conversion.plan.taught:
        return NodeFact(node=str(own), exported_as=_FITTED[conversion.strategy] + widened, exact=False)
    lost, biased = conversion.lost[node.module], conversion.held[node.module].bias is not None
    how = "factors of its change" + ("" if lost <= EXACT else f", less {lost:.2%}")
    how += ", with a fitted constant" if biased else ""
    distilled = conversion.strategy == "distilled"
    exact = lost <= EXACT and not (biased or widened or distilled)
    return NodeFact(node=str(own), exported_as=how + (", distilled" if distilled else "") + widened, exact=exact)


def _file(path: Path, conversion: LoraConversion) -> FileFact:
    fact = FileFact(name=path.name, sha256=digest_of_file(path), size=path.stat().st_size)
    if path.suffix != ".safetensors":
        return fact
    measured = {"dtype": "f32", "measured_in": "transformers", "evaluation": conversion.evaluation}
    return fact.model_copy(update=measured)
