"""Output rows that never win, and measuring a model that has virtual tokens in front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from virtual_token_cases import EXACT, Cases

from reft_ollama.architectures.table import architecture_of
from reft_ollama.export import export_ollama
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_ollama.plan.planning import make_plan
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.final_states import FinalStates
from reft_ollama.weights.installation import install
from reft_ollama.weights.stack import BaseWeights
from reft_ollama.weights.virtual_tokens import DEPTH
from reft_ollama.weights.virtual_tokens import with_virtual_tokens as add_virtual_tokens
from reft_plugins import plugins
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.fidelity.reference import Measurement, Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.program import ALL, Edit, Site


def test_without_measured_states_the_mean_row_never_wins(virtual_cases: Cases) -> None:
    case = virtual_cases("llama")
    config = AutoConfig.from_pretrained(case.directory)
    architecture = architecture_of(config)
    plan = make_plan(case.adapter.lower(), architecture, config)
    rows = assemble(plan, Checkpoint(case.directory), architecture, config).module("lm_head")["weight"].double()
    states = 100 * torch.randn(3000, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real, virtual = (part.amax(1) for part in (states @ rows[: case.vocabulary].T, states @ rows[case.vocabulary :].T))
    assert bool((virtual < real).all())
    inside = (states @ rows.T).softmax(1)[:, case.vocabulary :]
    assert float(inside.max()) <= 1 / case.vocabulary


def test_gemma_2_has_to_be_measured(virtual_cases: Cases, tmp_path: Path) -> None:
    case = virtual_cases("gemma2")
    with pytest.raises(UnsupportedProgramError, match="has to be measured.*--no-measure"):
        export_ollama(case.adapter, case.directory, tmp_path, dtype="f32", measure=False)
    unmeasured = virtual_cases("llama")
    result = export_ollama(unmeasured.adapter, unmeasured.directory, tmp_path, dtype="f32", measure=False)
    found = compare_llama_cpp(result.gguf, unmeasured.texts, unmeasured.logits, in_front=unmeasured.ids)
    assert found.max_logit_difference < EXACT


def test_a_direction_that_all_states_lie_on() -> None:
    noise = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    direction = FinalStates(noise + 2 * torch.ones(64), torch.ones(2000)).direction
    assert direction is not None
    new = torch.randn(2000, 64, generator=torch.Generator().manual_seed(2)) + 2 * torch.ones(64)
    assert float((new.double() @ direction).min()) > 0.5
    assert FinalStates(noise, torch.ones(2000)).direction is None, "states around zero have none"
    lonely = torch.cat([noise[:1000] + 2, -2 - noise[:1000]]).reshape(2, 1000, 64).transpose(0, 1).reshape(2000, 64)
    assert FinalStates(lonely, torch.ones(2000)).direction is None, "the half that checks it lies on the other side"


def test_measured_states_push_virtual_tokens_down(virtual_cases: Cases) -> None:
    case = virtual_cases("llama")
    config = AutoConfig.from_pretrained(case.directory)
    architecture = architecture_of(config)
    base = BaseWeights(Checkpoint(case.directory), architecture, config)
    states = torch.randn(400, 96, generator=torch.Generator().manual_seed(3)) + 3
    weights = add_virtual_tokens(base, architecture, torch.ones(2, 96), FinalStates(states, torch.ones(400)))
    rows = weights.module("lm_head")["weight"]
    mean, virtual = (states @ rows[:-2].T).mean(1), states @ rows[-1]
    assert float((mean - virtual)[::2].min()) == pytest.approx(DEPTH, rel=1e-3)
    assert float((mean - virtual)[1::2].min()) > DEPTH / 2


def test_a_measured_model_has_virtual_tokens_in_front(virtual_cases: Cases) -> None:
    """Predictions of the model with appended tokens, edits beside them, and a model whose virtual tokens are wrong."""
    case = virtual_cases("llama")
    config = AutoConfig.from_pretrained(case.directory)
    architecture, checkpoint = architecture_of(config), Checkpoint(case.directory)
    runtime: Any = plugins.runtimes.get("transformers")(case.directory, dtype="float32")
    program = case.adapter.lower()
    reference = Reference(runtime, program)
    measurement = Measurement(reference, [Text(tuple(text), 10, "text") for text in case.texts])
    batches = [batch for _, batch in reference.batches([Text(tuple(case.texts[0]), 10, "text")])]
    edit = Edit(Site(1), ALL, shift=torch.ones(96))
    with reference.running(batches[0], type(program)((*program, edit))):
        wanted = reference.forward(batches[0])
    assert reference.in_front == ()
    plan = make_plan(program, architecture, config)
    install(assemble(plan, checkpoint, architecture, config), architecture, runtime.model, torch.float32)
    assert reference.in_front == tuple(case.ids)
    exact = measurement.compare()["overall"]
    assert exact.max_logit_difference < EXACT and exact.base_mean_kl is not None and exact.base_mean_kl > 0.3
    assert measurement.virtual_probability is not None and 0 < measurement.virtual_probability <= 1 / case.vocabulary
    with reference.running(batches[0], type(program)((edit,))):
        edited = reference.forward(batches[0])
    torch.testing.assert_close(edited, wanted, rtol=0, atol=EXACT)
    assert plan.virtual_tokens is not None
    plan.virtual_tokens = plan.virtual_tokens.flip(0)
    install(assemble(plan, checkpoint, architecture, config), architecture, runtime.model, torch.float32)
    assert measurement.compare()["overall"].mean_kl > 0.05
    measurement.close()
