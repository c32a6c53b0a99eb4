"""Serves adapters in a tensor-parallel engine whose workers are Ray actors, and compares with the transformers runtime.

python -m examples.ray_serve.check_executor BASE ADAPTER [ADAPTER ...]
"""

from __future__ import annotations

import sys

import numpy as np
from scipy.special import log_softmax

import reft_plugins as reft


def main(base: str, adapters: list[str]) -> int:
    """Print the largest difference of log-probabilities per adapter; 1 if any is above 1e-3."""
    draw = np.random.default_rng(0)
    prompts = [[1, *draw.integers(5, 500, size=size).tolist()] for size in (3, 47, 100)]
    pairs = [(prompt, adapter) for prompt in prompts for adapter in (None, *adapters)]
    reference = reft.runtime("transformers", base)
    want = [log_softmax(reference.logits(prompt, adapter)[-1]) for prompt, adapter in pairs]
    engine = reft.runtime(
        "vllm", base, tensor_parallel_size=2, distributed_executor_backend="ray", enforce_eager=True, max_model_len=256
    )
    try:
        got = engine.next_logprobs([prompt for prompt, _ in pairs], [adapter for _, adapter in pairs])
    finally:
        engine.close()
    worst = dict.fromkeys((None, *adapters), 0.0)
    for (_, adapter), ours, theirs in zip(pairs, got, want, strict=True):
        worst[adapter] = max(worst[adapter], float(np.abs(ours - theirs).max()))
    for adapter, difference in worst.items():
        print(f"{adapter or 'base model'}: {difference:.1e}")
    return int(max(worst.values()) > 1e-3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
