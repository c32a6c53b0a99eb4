"""Random prompts with shared beginnings under random adapters, in an engine so short of memory that it preempts."""

from __future__ import annotations

import numpy as np
import pytest
import vllm_environment  # noqa: F401
from scipy.special import log_softmax
from strong_adapters import strong_lora, strong_loreft

import reft_plugins as reft

ENGINE = {
    "max_model_len": 224,
    "max_loras": 4,
    "max_lora_rank": 8,
    "max_num_batched_tokens": 40,
    "max_num_seqs": 12,
    "block_size": 32,
    "num_gpu_blocks_override": 14,
    "enforce_eager": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2], ids=["one rank", "tensor parallel"])
def test_soak(ranks, tiny_llama, monkeypatch) -> None:
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    adapters = [
        None,
        strong_lora(tiny_llama, seed=3),
        strong_loreft(tiny_llama, "f2+l2", seed=1),
        strong_loreft(tiny_llama, "all", seed=2, layers=(1, 2), scale=1.0),
        strong_loreft(tiny_llama, "f3+l3;cap=half", seed=4, shared=False),
        strong_loreft(tiny_llama, "l1", seed=5, activation="relu"),
        strong_loreft(tiny_llama, "f1+l2;trim=1", seed=6),
        strong_loreft(tiny_llama, "generated", seed=7),
        strong_loreft(tiny_llama, "prompt", seed=8),
        strong_loreft(tiny_llama, "[0,5,-1,-30]", seed=9),
    ]
    draw = np.random.default_rng(7)
    stems = [[1, *draw.integers(5, 500, size=160).tolist()] for _ in range(3)]

    def random_prompt() -> list[int]:
        length = int(draw.choice([32, 64, 96, 128])) if draw.random() < 0.3 else int(draw.integers(2, 160))
        prompt = stems[draw.integers(3)][:length]
        return prompt if draw.random() < 0.8 else [*prompt[:-1], int(draw.integers(5, 500))]

    reference = reft.runtime("transformers", tiny_llama)
    engine = reft.runtime("vllm", tiny_llama, tensor_parallel_size=ranks, **ENGINE)
    try:
        for _ in range(12):
            pairs = [(random_prompt(), adapters[draw.integers(len(adapters))]) for _ in range(40)]
            prompts, used = [prompt for prompt, _ in pairs], [adapter for _, adapter in pairs]
            want = np.stack([log_softmax(reference.logits(prompt, adapter)[-1]) for prompt, adapter in pairs])
            np.testing.assert_allclose(engine.next_logprobs(prompts, used), want, atol=1e-3)
            answers = engine.generate(prompts[:24], used[:24], max_new_tokens=20, ignore_eos=True)
            expected = reference.generate(prompts[:24], used[:24], max_new_tokens=20, ignore_eos=True)
            assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        assert engine.statistics()["most_adapters"] == ENGINE["max_loras"]
    finally:
        engine.close()
