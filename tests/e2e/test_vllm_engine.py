"""A real, compiled vLLM engine against the transformers runtime: log-probabilities, not only tokens.

The engine's token budget is small, so prompts are prefilled in chunks; prefix caching is on; there are fewer slots than
adapters. All adapters change most answers of the base, which the negative controls check.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_environment  # noqa: F401
from scipy.special import log_softmax
from strong_adapters import strong_lora, strong_loreft
from tiny_models import make_tiny_llama

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError, BaseMismatchError, UnsupportedProgramError
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import Program, WeightDelta

TOLERANCE = 1e-3
SLOTS, BUDGET, BLOCK = 3, 48, 32
ENGINE = {
    "max_model_len": 256,
    "max_loras": SLOTS,
    "max_lora_rank": 8,
    "max_num_batched_tokens": BUDGET,
    "max_num_seqs": 16,
    "block_size": BLOCK,
    "enable_prefix_caching": True,
}


@pytest.fixture(scope="module")
def reference(tiny_llama):
    return reft.runtime("transformers", tiny_llama)


@pytest.fixture(scope="module")
def adapters(tiny_llama, steering_plugin):
    vector = torch.randn(128, generator=torch.Generator().manual_seed(8)) * 3
    return {
        "base": None,
        "prefix and suffix": strong_loreft(tiny_llama, "f2+l2", seed=1),
        "all": strong_loreft(tiny_llama, "all", seed=2, layers=(1, 2), scale=1.0),
        "lora": strong_lora(tiny_llama, seed=3),
        "own parameters": strong_loreft(tiny_llama, "f3+l3;cap=half", seed=4, shared=False),
        "last": strong_loreft(tiny_llama, "l1", seed=5, activation="relu"),
        "trimmed": strong_loreft(tiny_llama, "f1+l2;trim=1", seed=6),
        "third party": Adapter.create(
            "steering_demo", {"layers": (1,), "positions": "prompt"}, {"1.vector": vector}, identify(tiny_llama)
        ),
        "generated": strong_loreft(tiny_llama, "generated", seed=7),
        "two deltas of one module": two_deltas(tiny_llama),
    }


def two_deltas(base: Path) -> Adapter:
    """Each alone moves most log-probabilities by more than the tolerance."""
    draw = torch.Generator().manual_seed(11)

    def delta(layer: int, scaling: float) -> WeightDelta:
        a, b = (torch.randn(*shape, generator=draw) * 0.3 for shape in ((4, 128), (128, 4)))
        return WeightDelta(f"model.layers.{layer}.self_attn.q_proj", a=a, b=b, scaling=scaling)

    return adapter_of(
        Program(tuple(delta(layer, scaling) for layer in range(4) for scaling in (2.0, 3.0))), identify(base)
    )


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(0)
    return [[1, *draw.integers(5, 500, size=size).tolist()] for size in (2, 7, 15, 31, 40, 47, 63, 64, 100, 130)]


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm-cache")
    os.environ["VLLM_CACHE_ROOT"] = str(root)
    return root


@pytest.fixture(scope="module")
def engine(tiny_llama, cache_root, steering_plugin):
    runtime = reft.runtime("vllm", tiny_llama, **ENGINE)
    yield runtime
    runtime.close()


def expected(reference, prompt, adapter):
    return log_softmax(reference.logits(prompt, adapter), axis=-1)


def test_engine_is_compiled_with_lora(engine) -> None:
    config = engine.llm.llm_engine.vllm_config
    assert config.lora_config is not None
    assert config.compilation_config.mode.name != "NONE"
    assert not config.model_config.enforce_eager
    assert config.cache_config.enable_prefix_caching


def test_log_probabilities_of_whole_prompts(engine, reference, adapters, prompts) -> None:
    for name, adapter in adapters.items():
        for prompt in (prompts[2], prompts[8]):
            want = expected(reference, prompt, adapter)
            np.testing.assert_allclose(engine.logits(prompt, adapter), want, atol=TOLERANCE, err_msg=name)
            if name not in ("base", "generated"):
                assert np.abs(want - expected(reference, prompt, None)).max() > 1, f"{name} is too weak to test"


def test_mixed_batches_with_more_adapters_than_slots(engine, reference, adapters, prompts) -> None:
    """Several orders: which adapters share a step, and in which slots they are, changes what could go wrong."""
    pairs = [(prompt, adapter) for prompt in prompts for adapter in adapters.values()]
    assert len(adapters) - 1 > SLOTS
    want = np.stack([expected(reference, prompt, adapter)[-1] for prompt, adapter in pairs])
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(pairs))
        got = engine.next_logprobs([pairs[i][0] for i in order], [pairs[i][1] for i in order])
        np.testing.assert_allclose(got, want[order], atol=TOLERANCE)
        engine.llm.reset_prefix_cache()
    assert engine.statistics()["most_adapters"] == SLOTS


def test_generated_tokens_equal_and_differ_from_the_base(engine, reference, adapters, prompts) -> None:
    pairs = [(prompt, adapter) for prompt in prompts[:6] for adapter in adapters.values() if adapter]
    batch, used = [prompt for prompt, _ in pairs], [adapter for _, adapter in pairs]
    got = engine.generate(batch, used, max_new_tokens=10, ignore_eos=True)
    want = reference.generate(batch, used, max_new_tokens=10, ignore_eos=True)
    bare = reference.generate(batch, max_new_tokens=10, ignore_eos=True)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    changed = np.mean([np.not_equal(w.token_ids, b.token_ids).mean() for w, b in zip(want, bare, strict=True)])
    assert changed > 0.5


def test_prefix_cache_under_different_adapters(engine, reference, adapters, prompts) -> None:
    """The same prompt twice under every adapter: answers from the cache are as right as the first."""
    prompt = prompts[-1]
    for _ in range(2):
        for name, adapter in adapters.items():
            got = engine.next_logprobs([prompt], [adapter])[0]
            np.testing.assert_allclose(got, expected(reference, prompt, adapter)[-1], atol=TOLERANCE, err_msg=name)


def test_longer_prompt_sharing_all_blocks_of_a_shorter_one(engine, reference, adapters) -> None:
    """The last token of the shorter prompt was edited; the longer one must not reuse its keys and values."""
    draw = np.random.default_rng(1)
    long = [1, *draw.integers(5, 500, size=4 * BLOCK - 1).tolist()]
    for name in ("last", "prefix and suffix", "trimmed"):
        for prompt in (long[: 2 * BLOCK], long[: 3 * BLOCK], long):
            got = engine.next_logprobs([prompt], [adapters[name]])[0]
            np.testing.assert_allclose(
                got, expected(reference, prompt, adapters[name])[-1], atol=TOLERANCE, err_msg=name
            )


def test_prefix_before_the_first_edit_is_shared(engine, adapters) -> None:
    draw = np.random.default_rng(2)
    prompt = [1, *draw.integers(5, 500, size=4 * BLOCK).tolist()]
    engine.next_logprobs([prompt], [None])
    assert cached_tokens(engine, prompt, adapters["last"]) == 4 * BLOCK
    assert cached_tokens(engine, prompt, adapters["prefix and suffix"]) == 0
    assert cached_tokens(engine, prompt, adapters["lora"]) == 0


def cached_tokens(engine, prompt, adapter) -> int:
    from vllm import SamplingParams

    return engine._run([prompt], [adapter], SamplingParams(max_tokens=1))[0].num_cached_tokens


def test_refused_adapters_leave_the_engine_running(engine, reference, adapters, prompts, tiny_llama, tmp_path) -> None:
    other = make_tiny_llama(tmp_path / "other", steps=0, seed=5)
    with pytest.raises(BaseMismatchError, match="made for base model"):
        engine.logits(prompts[0], strong_loreft(other, "f1", seed=1))
    with pytest.raises(UnsupportedProgramError, match="max-lora-rank 12"):
        engine.logits(prompts[0], strong_lora(tiny_llama, seed=1, rank=12))
    damaged = adapters["all"].save(tmp_path / "damaged")
    blob = bytearray((damaged / "adapter.safetensors").read_bytes())
    blob[-5] ^= 1
    (damaged / "adapter.safetensors").write_bytes(blob)
    with pytest.raises(AdapterError, match="a bit changed"):
        engine.logits(prompts[0], damaged)
    (damaged / "adapter.safetensors").write_bytes(blob[:-40])
    with pytest.raises(AdapterError, match="truncated"):
        engine.generate([prompts[0]], [damaged])
    got = engine.logits(prompts[0], adapters["all"])
    np.testing.assert_allclose(got, expected(reference, prompts[0], adapters["all"]), atol=TOLERANCE)


def test_broken_adapter_given_to_vllm_itself_fails_the_request_only(
    engine, reference, adapters, prompts, tmp_path
) -> None:
    """A LoRARequest that bypasses `reft.runtime` and was never preloaded."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    damaged = adapters["all"].save(tmp_path / "damaged")
    (damaged / "adapter.safetensors").write_bytes(b"")
    request = LoRARequest("damaged", 999, str(damaged))
    output = engine.llm.generate(
        [TokensPrompt(prompt_token_ids=prompts[0])], SamplingParams(max_tokens=2), lora_request=request, use_tqdm=False
    )
    assert output[0].outputs[0].finish_reason == "error"
    got = engine.logits(prompts[0], adapters["lora"])
    np.testing.assert_allclose(got, expected(reference, prompts[0], adapters["lora"]), atol=TOLERANCE)


def test_warm_compile_cache(engine, tiny_llama, cache_root: Path, reference, adapters, prompts) -> None:
    """Last in this file: closes the engine and starts one like it from the compile cache it left."""
    engine.close()
    compiled = {path.name for path in (cache_root / "torch_compile_cache").rglob("*.so")}
    assert compiled, "the first engine left no compiled code"
    again = reft.runtime("vllm", tiny_llama, **ENGINE)
    try:
        for name in ("prefix and suffix", "all", "lora"):
            got = again.logits(prompts[8], adapters[name])
            np.testing.assert_allclose(got, expected(reference, prompts[8], adapters[name]), atol=TOLERANCE)
        assert {path.name for path in (cache_root / "torch_compile_cache").rglob("*.so")} == compiled
    finally:
        again.close()


def test_compile_cache_made_without_the_plugin_is_not_used(tiny_llama) -> None:
    from vllm.config import VllmConfig
    from vllm.config.lora import LoRAConfig

    from reft_vllm.install import install

    install()
    plain, lora = VllmConfig(), VllmConfig(lora_config=LoRAConfig(max_lora_rank=8, lora_dtype="bfloat16"))
    stock = VllmConfig.compute_hash.__wrapped__
    assert plain.compute_hash() == stock(plain)
    assert lora.compute_hash() != stock(lora)
