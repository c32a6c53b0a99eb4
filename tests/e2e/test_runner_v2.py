"""vLLM's V2 model runner on CPU, its Triton kernels interpreted, against the transformers runtime.

Prompts are prefilled in chunks of 40 tokens, the prefix cache is on, there are too few blocks for all requests, and
n-gram drafts make the runner's own count of computed tokens an optimistic one.
"""

from __future__ import annotations

import numpy as np
import pytest
import vllm_environment  # noqa: F401
from scipy.special import log_softmax
from strong_adapters import strong_lora, strong_loreft
from triton_on_cpu import install_triton_on_cpu, use_v2_runner

import reft_plugins as reft

TOLERANCE = 1e-3
ENGINE = {
    "max_model_len": 192,
    "max_loras": 4,
    "max_lora_rank": 8,
    "max_num_batched_tokens": 40,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 14,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
}


@pytest.fixture(scope="module")
def engine(tiny_llama, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_v2_runner(patch, install_triton_on_cpu(tmp_path_factory.mktemp("triton") / "site"))
        runtime = reft.runtime("vllm", tiny_llama, **ENGINE)
        yield runtime
        runtime.close()


@pytest.fixture(scope="module")
def reference(tiny_llama):
    return reft.runtime("transformers", tiny_llama)


@pytest.fixture(scope="module")
def adapters(tiny_llama):
    return {
        "base": None,
        "prefix and suffix": strong_loreft(tiny_llama, "f2+l2", seed=1),
        "all": strong_loreft(tiny_llama, "all", seed=2, layers=(1, 2), scale=1.0),
        "lora": strong_lora(tiny_llama, seed=3),
        "generated": strong_loreft(tiny_llama, "generated", seed=7),
        "single tokens": strong_loreft(tiny_llama, "[0,5,-1]", seed=9),
    }


@pytest.fixture(scope="module")
def prompts():
    """Each ends as it began, so that drafts are found."""
    draw = np.random.default_rng(0)
    beginnings = [[1, *draw.integers(5, 500, size=size).tolist()] for size in (6, 14, 30, 47, 63, 99)]
    return [[*beginning, *beginning[1:5]] for beginning in beginnings]


def test_this_is_the_v2_runner(engine) -> None:
    assert engine.llm.llm_engine.vllm_config.use_v2_model_runner


def test_log_probabilities_of_whole_prompts(engine, reference, adapters, prompts) -> None:
    for name, adapter in adapters.items():
        for prompt in (prompts[1], prompts[-1]):
            want = log_softmax(reference.logits(prompt, adapter), axis=-1)
            np.testing.assert_allclose(engine.logits(prompt, adapter), want, atol=TOLERANCE, err_msg=name)
            bare = log_softmax(reference.logits(prompt, None), axis=-1)
            assert name in ("base", "generated") or np.abs(want - bare).max() > 1, f"{name} is too weak to test"


def test_mixed_batches_preempted_and_speculated(engine, reference, adapters, prompts) -> None:
    pairs = [(prompt, adapter) for prompt in prompts for adapter in adapters.values()]
    order = np.random.default_rng(1).permutation(len(pairs))
    batch, used = [pairs[i][0] for i in order], [pairs[i][1] for i in order]
    before = engine.statistics()
    got = [answer.token_ids for answer in engine.generate(batch, used, max_new_tokens=40, ignore_eos=True)]
    want = [answer.token_ids for answer in reference.generate(batch, used, max_new_tokens=40, ignore_eos=True)]
    bare = [answer.token_ids for answer in reference.generate(batch, max_new_tokens=40, ignore_eos=True)]
    assert got == want
    changed = [np.mean(np.not_equal(w, b)) for w, b, one in zip(want, bare, used, strict=True) if one is not None]
    assert np.mean(changed) > 0.5
    steps = engine.statistics()["steps"] - before["steps"]
    assert engine.statistics()["most_adapters"] == ENGINE["max_loras"]
    assert steps < sum(map(len, got)), "fewer steps than tokens"


def test_cached_prefixes(engine, reference, adapters, prompts) -> None:
    prompt = prompts[-1]
    for _ in range(2):
        for name, adapter in adapters.items():
            want = log_softmax(reference.logits(prompt, adapter)[-1])
            got = engine.next_logprobs([prompt], [adapter])[0]
            np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=name)
