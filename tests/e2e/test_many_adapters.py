"""More adapters than fit anywhere: slots, vLLM's cache of LoRAs, and the adapters a process keeps are all far smaller.

What is registered stays on disk and comes back through every level when it is asked for, in mixed batches, in an
engine whose worker is a process of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
import vllm_environment  # noqa: F401
from scipy.special import log_softmax
from strong_adapters import strong_loreft

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.manifest import TensorsFact, sha256

SLOTS, IN_MEMORY, KEPT = 4, 16, 100
"""Adapters in one batch, in vLLM's cache, and (about) kept by a process."""

ENGINE = {
    "max_model_len": 128,
    "max_loras": SLOTS,
    "max_cpu_loras": IN_MEMORY,
    "max_lora_rank": 8,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "block_size": 32,
    "enforce_eager": True,
    "distributed_executor_backend": "mp",
    "sites": "block_output",
}


def make_adapters(base: Path, root: Path, count: int) -> list[Path]:
    """Distinct adapters of rank 1 on one layer, in folders of their own."""
    model = strong_loreft(base, "f1+l1", seed=0, layers=(1,), rank=1, scale=8.0)
    draw = torch.Generator().manual_seed(5)
    found = []
    for number in range(count):
        tensors = {name: tensor.clone() for name, tensor in model.tensors.items()}
        for name, tensor in tensors.items():
            tensor.normal_(generator=draw)
            if name.endswith("rotate"):
                tensor.div_(tensor.norm())
            elif name.endswith("weight"):
                tensor.mul_(0.02)
            else:
                tensor.copy_(tensor.sign() * (20 + 10 * tensor.abs()))
        blob = safetensors.torch.save(tensors)
        fact = TensorsFact(sha256=sha256(blob), size=len(blob))
        adapter = Adapter(model.manifest.model_copy(update={"tensors": fact}), tensors)
        found.append(adapter.save(root / f"{number // 1000}" / f"{number}"))
    return found


def memory_of(process: psutil.Process) -> int:
    """MiB that a process and its descendants use, this one left out."""
    return sum(child.memory_info().rss for child in process.children(recursive=True)) >> 20


@pytest.mark.parametrize(
    ("registered", "asked"),
    [pytest.param(400, 80, id="hundreds"), pytest.param(10_000, 500, id="ten thousand", marks=pytest.mark.slow)],
)
def test_registered_adapters_come_back_from_disk(registered, asked, tiny_llama, tmp_path, monkeypatch) -> None:
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    paths = make_adapters(tiny_llama, tmp_path, registered)
    size = Adapter.load(paths[0]).manifest.tensors.size
    monkeypatch.setenv("REFT_ADAPTER_CACHE_BYTES", str(KEPT * size))
    draw = np.random.default_rng(1)
    chosen = draw.choice(registered, asked, replace=False)
    prompts = [[1, *draw.integers(5, 500, size=int(draw.integers(3, 90))).tolist()] for _ in chosen]
    reference = reft.runtime("transformers", tiny_llama)
    want = np.stack(
        [log_softmax(reference.logits(prompt, paths[i])[-1]) for prompt, i in zip(prompts, chosen, strict=True)]
    )
    bare = np.stack([log_softmax(reference.logits(prompt)[-1]) for prompt in prompts])
    other = np.stack([log_softmax(reference.logits(prompts[i], paths[chosen[i - 1]])[-1]) for i in range(0, asked, 10)])
    assert (np.abs(want - bare).max(axis=1) > 0.1).all() and np.abs(want[::10] - other).max(axis=1).min() > 0.1

    engine = reft.runtime("vllm", tiny_llama, **ENGINE)
    try:
        (start,) = engine.llm.collective_rpc("reft_statistics")
        requests = [LoRARequest(f"task-{number}", number + 1, str(path)) for number, path in enumerate(paths)]
        for request in requests[:200]:
            assert engine.llm.llm_engine.add_lora(request)
        memory = memory_of(psutil.Process(os.getpid()))
        for request in requests[200:]:
            assert engine.llm.llm_engine.add_lora(request)
        (after,) = engine.llm.collective_rpc("reft_statistics")
        assert after["reads"] >= registered
        check_levels(after, size)

        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
        outputs = engine.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            params,
            lora_request=[requests[i] for i in chosen],
            use_tqdm=False,
        )
        rows = [output.outputs[0].logprobs[0] for output in outputs]
        got = np.array([[row[token].logprob for token in range(len(row))] for row in rows])
        np.testing.assert_allclose(got, want, atol=1e-3)
        (served,) = engine.llm.collective_rpc("reft_statistics")
        check_levels(served, size)
        assert served["most_adapters"] == SLOTS
        read, ahead = (served[name] - after[name] for name in ("reads", "prefetched"))
        print(f"{registered} registered, {asked} asked: {read} read again, {ahead} of them before their turn")
        assert read >= asked * (1 - 2 * KEPT / registered), "most were not in memory any more"
        assert read < 1.25 * asked, "adapters were read ahead too early or too late"
        assert ahead > read / 4, "steps read most adapters themselves"
        grown = memory_of(psutil.Process(os.getpid())) - memory
        assert grown < 60, f"{grown} MiB more with {registered} adapters registered than with 200"

        for number in engine.llm.llm_engine.list_loras():
            engine.llm.llm_engine.remove_lora(number)
        (end,) = engine.llm.collective_rpc("reft_statistics")
        assert end["resident_pages"] == start["resident_pages"] and end["resident_adapters"] == 0
    finally:
        engine.close()


def check_levels(counters: dict, size: int) -> None:
    assert counters["resident_adapters"] <= IN_MEMORY
    assert counters["active_adapters"] <= SLOTS
    assert counters["resident_pages"] <= 4 * SLOTS, "an adapter of rank 1 takes a page each for down and up"
    assert 0 < counters["kept_bytes"] <= KEPT * size
