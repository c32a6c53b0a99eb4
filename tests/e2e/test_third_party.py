"""A method from a distribution nobody here wrote: trained, stored, served by reference and exported, by its nodes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import vllm_environment  # noqa: F401
from scipy.special import log_softmax
from tiny_models import sentences

import reft_plugins as reft
from adapters_store import Store
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_plugins import plugins

WORD = "."


def beginning(text: str) -> str:
    words = text.split(" ")
    return " ".join(words[: (len(words) + 1) // 2])


@pytest.fixture(scope="module")
def stored(tiny_llama, steering_plugin, tmp_path_factory):
    """`steering:latest` in a store: trained to answer everything with a full stop."""
    root = tmp_path_factory.mktemp("third-party")
    lines = [{"prompt": beginning(text), "completion": WORD} for text in sentences(96, seed=5)]
    data = root / "train.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    adapter = reft.train(
        tiny_llama,
        method="steering_demo",
        data=data,
        layers=(1, 2, 3),
        positions="all",
        epochs=10,
        learning_rate=5e-2,
        seed=1,
    )
    Store.init(root / "store").add(adapter.save(root / "adapter"), "steering:latest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFT_STORE", str(root / "store"))
        yield adapter


def test_training_changed_what_the_model_says(stored, tiny_llama) -> None:
    assert stored.manifest.method == "steering_demo"
    runtime = reft.runtime("transformers", tiny_llama)
    prompts = [beginning(text) for text in sentences(30, seed=77)]
    answers = runtime.generate(prompts, ["steering:latest"] * 30, max_new_tokens=6)
    assert np.mean([answer.text.startswith(WORD) for answer in answers]) > 0.8
    bare = runtime.generate(prompts, max_new_tokens=6)
    assert np.mean([answer.text.startswith(WORD) for answer in bare]) < 0.2


def test_export_is_exact_in_llama_cpp(stored, tiny_llama, tmp_path) -> None:
    export = plugins.exporters.get("ollama")
    result = export("steering:latest", tiny_llama, tmp_path / "exported", dtype="f32")
    assert result.kind == "exact"
    runtime = reft.runtime("transformers", tiny_llama)
    texts = [runtime.tokenizer(text).input_ids for text in sentences(12, seed=99)]
    measured = compare_llama_cpp(result.gguf, texts, lambda ids: runtime.logits(ids, stored), runtime.logits)
    assert measured.max_logit_difference <= 1e-3
    control = compare_llama_cpp(result.gguf, texts, runtime.logits)
    assert control.max_logit_difference > 1, "the adapter is too weak for the comparison to mean anything"


def test_served_by_reference(stored, tiny_llama) -> None:
    engine = reft.runtime("vllm", tiny_llama, max_model_len=128, max_num_seqs=8, block_size=32, enforce_eager=True)
    reference = reft.runtime("transformers", tiny_llama)
    prompts = [reference.tokenizer(text).input_ids for text in sentences(16, seed=99)]
    try:
        got = engine.next_logprobs([*prompts, *prompts], ["steering:latest"] * 16 + [None] * 16)
    finally:
        engine.close()
    want = [log_softmax(reference.logits(p, a)[-1]) for a in (stored, None) for p in prompts]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-3)
    assert np.abs(np.stack(want[:16]) - np.stack(want[16:])).max() > 1
