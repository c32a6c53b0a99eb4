"""Random lives of engines so short of memory that they preempt and evict; see `soak`.

`REFT_SOAK_SEED` chooses another life, `REFT_SOAK_REQUESTS` a longer one.
"""

from __future__ import annotations

import os

import psutil
import pytest
import vllm_environment  # noqa: F401
from reference_answers import Reference
from soak import Soak

import reft_plugins as reft

ENGINE = {
    "max_model_len": 224,
    "max_loras": 4,
    "max_cpu_loras": 8,
    "max_lora_rank": 8,
    "max_num_batched_tokens": 40,
    "max_num_seqs": 12,
    "block_size": 32,
    "num_gpu_blocks_override": 14,
    "enforce_eager": True,
    "disable_log_stats": False,
}
SEED = int(os.environ.get("REFT_SOAK_SEED", "4"))
LONG = int(os.environ.get("REFT_SOAK_REQUESTS", "2000"))
GROWTH = 200 << 20
"""Bytes by which the processes of an engine may grow: what they keep of adapters, and what allocators hold back."""


@pytest.mark.parametrize(
    ("requests", "ranks"),
    [
        pytest.param(100, 1, id="short"),
        pytest.param(LONG, 1, id="long", marks=pytest.mark.slow),
        pytest.param(LONG, 2, id="tensor parallel", marks=pytest.mark.slow),
    ],
)
def test_soak(requests, ranks, tiny_llama, tmp_path, monkeypatch) -> None:
    print(f"seed {SEED}, {requests} requests, {ranks} ranks")
    monkeypatch.setenv("REFT_ADAPTER_CACHE_BYTES", str(16 << 20))
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    reference = Reference(reft.runtime("transformers", tiny_llama), keep=50)
    engine = reft.runtime("vllm", tiny_llama, tensor_parallel_size=ranks, **ENGINE)
    try:
        soak = Soak(engine, reference, tiny_llama, tmp_path, SEED)
        soak.live(requests // 5)
        before = memory()
        soak.live(requests)
        soak.clear()
        left = engine.statistics()
        assert left["resident_pages"] == left["resident_adapters"] == left["active_adapters"] == 0
        assert memory() - before < GROWTH
        assert left["most_adapters"] == ENGINE["max_loras"]
        assert soak.counts["changed"] > 0.95 * soak.counts["adapted"] > 0.4 * requests
        preempted = [metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions"]
        assert sum(preempted) > 0
        print(dict(soak.counts), left, f"{(memory() - before) >> 20} MiB more")
    finally:
        engine.close()


def memory() -> int:
    """Bytes of physical memory that the processes of the engine hold, what they share counted once."""
    return sum(process.memory_full_info().pss for process in psutil.Process().children(recursive=True))
