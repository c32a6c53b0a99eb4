"""Fixtures of the tests of fidelity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fidelity_bench import Bench, held_out
from strong_programs import Strong

from reft_plugins import plugins
from reft_plugins.fidelity.evaluation import Evaluator
from reft_plugins.fidelity.reference import Reference
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site


@pytest.fixture(scope="module")
def bench(tiny_llama: Path) -> Iterator[Bench]:
    """The model has the adapter installed exactly; whoever damages it must repair it."""
    strong = Strong(tiny_llama, seed=3)
    shift = 2 * strong.normal(128)
    adapter = strong.adapter(Edit(Site(1), Positions.parse("all"), shift=shift))
    runtime = plugins.runtimes.get("transformers")(tiny_llama, dtype="float32")
    texts = held_out(runtime.tokenizer)
    reference = Reference(runtime, adapter.lower())
    found = Bench(runtime, adapter, shift, texts, Evaluator(reference, runtime, adapter, texts))
    found.install()
    yield found
    found.evaluator.close()
