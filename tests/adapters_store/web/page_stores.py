"""A store with something of everything that the page shows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from adapter_variants import make_adapter, vary

from adapters_store import Store
from adapters_store.layout.oci import CERTIFICATE_TYPE, SIGNATURE_TYPE
from reft_plugins.fidelity.certificate import AdapterFact, Certificate, FileFact, NodeFact, TextFact, TextsFact
from reft_plugins.fidelity.comparison import Bucket, Fidelity
from reft_plugins.fidelity.evaluation import Evaluation
from reft_plugins.fidelity.layers import LayerError
from reft_plugins.manifest import parse_manifest, read_manifest, sha256

SCRIPT = "<script>document.title='owned'</script>"
HOSTILE = f"\x1b[31m\u202e{SCRIPT}<img src=x onerror=document.title='owned'>'\"&lt;\nsecond line\x07\x00"
ACCURACIES = (0.81, 0.84, 0.9)
MANY = 60
"""Adapters called `many/task-00`, …: more than fit on a page."""
DATA = "sha256:" + "d" * 64


def build(root: Path, work: Path) -> Store:
    """Fill a new store.

    `sentiment` has three trained versions that differ, tags that moved, a certificate and a signature at the last;
    `polite` is composed of it and of `tone`, `team/exported` converted from that; `hostile` lies in every text.
    """
    store = Store.init(root)
    trained = []
    for number, accuracy in enumerate(ACCURACIES):
        training = _training({"accuracy": accuracy, "loss": 1 - accuracy}, number)
        source = make_adapter(work / f"sentiment-{number}", seed=number)
        trained.append(_rewrite(source, work / f"trained-{number}", training=training))
        store.add(trained[-1], "sentiment:candidate")
    store.tag("sentiment@v2", "production")
    store.tag("sentiment@v3", "production")
    tone = vary(trained[0], work / "tone", "tone")
    store.add(tone, "tone:latest")
    parents = [
        {"relation": "composed", "source": "sentiment:production", "digest": _digest(trained[2])},
        {"relation": "composed", "source": "tone:latest", "digest": _digest(tone)},
    ]
    polite = _rewrite(trained[1], work / "polite", parents=parents, training=None)
    store.add(polite, "polite:latest")
    parents = [{"relation": "converted", "source": "polite:latest", "digest": _digest(polite)}]
    store.add(_rewrite(trained[1], work / "exported", parents=parents, training=None), "team/exported:latest")
    store.add(hostile(trained[0], work / "hostile"), "hostile:latest")
    for number in range(MANY):
        store.add(vary(trained[0], work / f"many-{number}", str(number)), f"many/task-{number:02d}:latest")
    store.attach("sentiment@v3", CERTIFICATE_TYPE, _certificate_file(certificate(trained[2]).text()))
    store.attach("sentiment@v3", SIGNATURE_TYPE, {"signature.json": ("application/json", b"{}")})
    lying = certificate(trained[2]).model_copy(update={"producer": HOSTILE, "warnings": (HOSTILE, "$\\frac{")})
    store.attach("hostile@v1", CERTIFICATE_TYPE, _certificate_file(lying.text()))
    store.attach("hostile@v1", CERTIFICATE_TYPE, _certificate_file(json.dumps({SCRIPT: SCRIPT})))
    return store


def hostile(source: Path, target: Path) -> Path:
    """An adapter whose every text is what its author should not have written."""
    manifest = json.loads((source / "adapter.json").read_text())
    base = {**manifest["base"], "name": HOSTILE, "revision": HOSTILE, "architecture": HOSTILE}
    training = _training({SCRIPT: 0.5, "$\\frac{": 1.0, "huge": 1.7e308, "x" * 3000: -1e-300}, 0)
    return _rewrite(
        source,
        target,
        base=base,
        notes={HOSTILE: HOSTILE, "long": "y" * 100_000},
        parents=[{"relation": HOSTILE, "source": HOSTILE}, {"relation": "imported", "source": "javascript:alert(1)"}],
        training={**training, "arguments": {HOSTILE: [HOSTILE, {"deep": SCRIPT}]}},
    )


def certificate(directory: Path) -> Certificate:
    """An approximated export in two formats, measured on two sources of text."""
    manifest = read_manifest(directory)
    assert manifest.base is not None
    return Certificate(
        producer="reft-plugins 1",
        exported_to="ollama",
        kind="approximated",
        strategy="neurons",
        adapter=AdapterFact(reference="sentiment@v3", digest=_digest(directory), method=manifest.method),
        base=manifest.base,
        nodes=(NodeFact(node="Edit(layer 1 | block_output)", exported_as="neurons", exact=False),),
        texts=TextsFact(held_out=(TextFact(source="own", texts=3, tokens=300),)),
        files=(
            FileFact(name="model.gguf", sha256=DATA, size=1234567, dtype="f16", evaluation=_evaluation(1.0)),
            FileFact(name="small.gguf", sha256=DATA, size=234567, dtype="q4_k_m", evaluation=_evaluation(7.0)),
        ),
        warnings=("positions were widened",),
    )


def _evaluation(worse: float) -> Evaluation:
    places = tuple(Bucket(first=k, last=k, tokens=9, mean_kl=worse * 1e-3, top1_agreement=0.9) for k in range(4))
    fidelity = Fidelity(
        tokens=300,
        max_logit_difference=0.1 * worse,
        mean_kl=2e-3 * worse,
        top1_agreement=1 - 0.0123 * worse,
        base_mean_kl=0.4,
        base_top1_agreement=0.5,
        positions=places,
    )
    layers = tuple(LayerError(layer=k, error=0.01 * worse, base_error=0.2) for k in range(2))
    return Evaluation(fidelity=fidelity, sources={"own": fidelity, "costs $5 or $6": fidelity}, layers=layers)


def _certificate_file(text: str) -> dict[str, tuple[str, bytes]]:
    return {"certificate.json": ("application/json", text.encode())}


def _digest(directory: Path) -> str:
    return sha256(read_manifest(directory).to_json().encode())


def _training(metrics: dict[str, float], seed: int) -> dict[str, Any]:
    return {"data_sha256": DATA, "examples": 42, "seed": seed, "steps": 10, "epochs": 1.5, "metrics": metrics}


def _rewrite(source: Path, target: Path, **fields: Any) -> Path:
    target.mkdir(parents=True)
    document = {**json.loads((source / "adapter.json").read_text()), **fields}
    text = json.dumps(document)
    (target / "adapter.json").write_text(parse_manifest(text.encode(), "test").to_json())
    os.link(source / "adapter.safetensors", target / "adapter.safetensors")
    return target
