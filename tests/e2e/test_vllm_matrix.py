"""Every kind of adapter in one engine, mixed in its batches, against the transformers runtime."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import vllm_environment  # noqa: F401
from matrix_adapters import edits_of_every_kind, prompts_of_every_kind, weights_of_every_kind
from reference_answers import TOLERANCE, Reference, check_answers
from strong_programs import Strong
from tiny_architectures import tiny

import reft_plugins as reft
from reft_plugins.program import Program

SLOTS = 16
ENGINE = {"max_model_len": 128, "max_loras": SLOTS, "max_num_seqs": 48, "block_size": 32, "enforce_eager": True}
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PACKED = ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def adapters(tiny_llama):
    return {
        **edits_of_every_kind(tiny_llama),
        **weights_of_every_kind(tiny_llama, ATTENTION, FEED_FORWARD),
        **prompts_of_every_kind(tiny_llama),
    }


@pytest.fixture(scope="module")
def reference(tiny_llama):
    return Reference(reft.runtime("transformers", tiny_llama))


@pytest.fixture(scope="module")
def engine(tiny_llama):
    runtime = reft.runtime("vllm", tiny_llama, **ENGINE)
    yield runtime
    runtime.close()


def random_prompts(vocabulary: int, *lengths: int) -> list[list[int]]:
    draw = np.random.default_rng(sum(lengths))
    return [[1, *draw.integers(5, vocabulary, size=length - 1).tolist()] for length in lengths]


def test_every_node_matters(tiny_llama, adapters, reference) -> None:
    """Without any one of its nodes an adapter says something else, so that none can be left out unseen."""
    strong = Strong(tiny_llama)
    (prompt,) = random_prompts(500, 40)
    tokens = [*prompt, 7, 9]
    for name, adapter in adapters.items():
        nodes = adapter.lower().nodes
        whole = reference.runtime.logits(tokens, adapter, prompt_length=len(prompt))
        for index, node in enumerate(nodes if len(nodes) > 1 else ()):
            rest = strong.adapter(Program(nodes[:index] + nodes[index + 1 :]).nodes)
            moved = np.abs(reference.runtime.logits(tokens, rest, prompt_length=len(prompt)) - whole).max()
            assert moved > 10 * TOLERANCE, f"{name}: {node} moves {moved:.2g} only"


def test_whole_prompts_in_one_batch(engine, adapters, reference) -> None:
    """The log-probabilities of every token of a prompt, under all adapters at once."""
    from vllm import SamplingParams

    (prompt,) = random_prompts(500, 24)
    used = list(adapters.values())
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, ignore_eos=True)
    outputs = engine._run([prompt] * len(used), used, params)
    for name, adapter, output in zip(adapters, used, outputs, strict=True):
        want = reference.rows(prompt, adapter)
        for row, found in zip(want, [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]], strict=True):
            got = np.array([found[token].logprob for token in range(len(row))])
            np.testing.assert_allclose(got, row, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("lengths", [(9, 40), (33, 64), (3, 97)])
def test_mixed_batches(lengths, engine, adapters, reference) -> None:
    """Twice, in two orders: the second time the beginnings of prompts come from the prefix cache."""
    assert len({adapter.manifest.method for adapter in adapters.values()}) >= 5
    check_mixed(engine, reference, [*adapters.values(), None], random_prompts(500, *lengths))
    assert engine.statistics()["most_adapters"] == SLOTS


def check_mixed(engine, reference, adapters, prompts) -> None:
    from vllm import SamplingParams

    pairs = [(prompt, adapter) for prompt in prompts for adapter in adapters]
    assert len(pairs) >= 32
    params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=20, ignore_eos=True)
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(pairs))
        batch, used = [pairs[i][0] for i in order], [pairs[i][1] for i in order]
        check_answers(reference, batch, used, engine._run(batch, used, params))


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2", "gemma3", "phi3", "mistral")),
    ],
)
def test_other_architectures(architecture, tiny_llama, tmp_path) -> None:
    base = saved(architecture, tiny_llama, tmp_path / architecture)
    modules = PACKED if architecture == "phi3" else (ATTENTION, FEED_FORWARD)
    adapters = {**edits_of_every_kind(base), **weights_of_every_kind(base, *modules)}
    engine = reft.runtime("vllm", base, **ENGINE)
    try:
        reference = Reference(reft.runtime("transformers", base))
        check_mixed(engine, reference, [*adapters.values(), None], random_prompts(95, 9, 40))
    finally:
        engine.close()


def saved(architecture: str, tokenizer: Path, folder: Path) -> Path:
    """A random model with heads of 32, which vLLM's CPU attention takes, and somebody else's tokenizer."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    heads = {} if architecture in ("qwen2", "phi3") else {"head_dim": 32}
    tiny(architecture, **sizes, **heads).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder
