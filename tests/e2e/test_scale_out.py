"""Several processes on one model: tensor, pipeline and data parallel engines against the transformers runtime.

Every adapter edits something that is split differently: hidden states that all tensor-parallel ranks hold whole,
components and weights of which each rank holds a part, layers that live on one pipeline rank only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_environment  # noqa: F401
from scipy.special import log_softmax
from strong_adapters import strong_lora, strong_loreft
from strong_programs import Strong

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.capturing import capture
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Node, Program, Site, WeightDelta

TOLERANCE = 1e-3
HIDDEN, HEADS, VALUES, INNER, LAYERS = 128, 4 * 32, 2 * 32, 352, 4
ENGINE = {
    "max_model_len": 256,
    "max_loras": 3,
    "max_lora_rank": 8,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 8,
    "block_size": 32,
}


def components(base: Path) -> Adapter:
    """Low-rank edits of what is split over ranks between attention and its projection, and inside the MLP."""
    draw = torch.Generator().manual_seed(21)

    def edit(layer: int, component: str, width: int, positions: str, activation: str) -> Edit:
        down, up = (torch.randn(3, width, generator=draw) * scale for scale in (0.3, 1.0))
        shift = torch.randn(width, generator=draw)
        place = Site(layer, component)
        return Edit(place, Positions.parse(positions), down=down, up=up, activation=activation, shift=shift)

    nodes: list[Node] = []
    for layer in range(LAYERS):
        nodes.append(edit(layer, "attention_value_output", HEADS, "all", "identity"))
        nodes.append(edit(layer, "mlp_activation", INNER, "f2+l2", "relu"))
        nodes.append(edit(layer, "attention_output", HIDDEN, "prompt", "tanh"))
    return adapter_of(Program(tuple(nodes)), identify(base))


def linears(base: Path) -> Adapter:
    """Scales, biases and deltas at some positions, on modules split by output, by input and by heads."""
    draw = torch.Generator().manual_seed(22)
    sizes = {
        "self_attn.q_proj": (HEADS, HIDDEN),
        "self_attn.v_proj": (VALUES, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    nodes: list[Node] = []
    for layer in range(LAYERS):
        for module, (outputs, inputs) in sizes.items():
            nodes.append(
                WeightDelta(
                    f"model.layers.{layer}.{module}",
                    a=torch.randn(2, inputs, generator=draw) * 0.2,
                    b=torch.randn(outputs, 2, generator=draw) * 0.2,
                    bias=torch.randn(outputs, generator=draw) * 0.3,
                    output_scale=torch.rand(outputs, generator=draw) * 2,
                    input_scale=torch.rand(inputs, generator=draw) * 2 if module.endswith("down_proj") else None,
                    positions=Positions.parse("f3+l2"),
                )
            )
    return adapter_of(Program(tuple(nodes)), identify(base))


@pytest.fixture(scope="module")
def adapters(tiny_llama) -> dict[str, Adapter | None]:
    strong = Strong(tiny_llama, seed=9)
    return {
        "base": None,
        "prefix and suffix": strong_loreft(tiny_llama, "f2+l2", seed=1),
        "all": strong_loreft(tiny_llama, "all", seed=2, layers=(1, 2), scale=1.0),
        "last layer only": strong_loreft(tiny_llama, "all", seed=6, layers=(3,)),
        "lora": strong_lora(tiny_llama, seed=3),
        "components": components(tiny_llama),
        "linears": linears(tiny_llama),
        "row norms": strong.adapter([strong.dora(module) for module in strong.sizes]),
        "virtual tokens": strong.adapter(strong.virtual_tokens(5)),
        "prefixes": strong.adapter(strong.prefixes(4)),
        "gated prefixes": strong.adapter(strong.prefixes(3, gated=True)),
        "gated prefixes after the projection": strong.adapter(strong.prefixes(3, gated=True, projected=False)),
    }


@pytest.fixture(scope="module")
def reference(tiny_llama):
    return reft.runtime("transformers", tiny_llama)


@pytest.fixture(scope="module")
def pairs(adapters):
    """Prompts of one chunk and of several, each under every adapter, adapters mixed."""
    draw = np.random.default_rng(0)
    prompts = [[1, *draw.integers(5, 500, size=size).tolist()] for size in (3, 47, 100)]
    every = [(prompt, name) for prompt in prompts for name in adapters]
    return [every[i] for i in draw.permutation(len(every))]


@pytest.fixture(scope="module")
def expected(reference, adapters, pairs):
    """Log-probabilities `[pairs, vocabulary]`; every adapter changes them by a hundred tolerances."""
    want = np.stack([log_softmax(reference.logits(prompt, adapters[name])[-1]) for prompt, name in pairs])
    bare = np.stack([log_softmax(reference.logits(prompt)[-1]) for prompt, _ in pairs])
    for (_, name), row, without in zip(pairs, want, bare, strict=True):
        assert name == "base" or np.abs(row - without).max() > 100 * TOLERANCE, f"{name} is too weak to test"
    return want


@pytest.fixture
def two_cores(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


def check_parallel_engine(base: Path, reference, adapters, pairs, expected, **parallel) -> None:
    prompts, used = [prompt for prompt, _ in pairs], [adapters[name] for _, name in pairs]
    engine = reft.runtime("vllm", base, **{**ENGINE, **parallel})
    try:
        for _ in range(2):  # the second time from the prefix cache
            difference = np.abs(engine.next_logprobs(prompts, used) - expected).max(axis=1)
            worst = {
                name: max(d for d, (_, n) in zip(difference, pairs, strict=True) if n == name) for name in adapters
            }
            assert max(worst.values()) < TOLERANCE, worst
        answers = engine.generate(prompts, used, max_new_tokens=6, ignore_eos=True)
        want = reference.generate(prompts, used, max_new_tokens=6, ignore_eos=True)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in want]
        check_captures(engine, base, prompts[:3], used[:3])
        workers = engine.llm.collective_rpc("reft_statistics")
        assert len(workers) == 2 and all(worker["edited_tokens"] for worker in workers)
    finally:
        engine.close()


def check_captures(engine, base: Path, prompts, used) -> None:
    """Of a state that every rank holds whole, and of two that each holds a part of."""
    sites = ("3:block_output", "0:mlp_activation", "2:attention_value_output")
    for prompt, adapter, found in zip(prompts, used, engine.capture(prompts, sites, "f2+l1", used), strict=True):
        want = capture(base, [prompt], sites, "f2+l1", adapter=adapter).activations
        assert set(found) == set(want)
        for site, rows in want.items():
            np.testing.assert_allclose(found[site], rows, atol=TOLERANCE, err_msg=str(site))


def test_tensor_parallel(two_cores, tiny_llama, reference, adapters, pairs, expected) -> None:
    check_parallel_engine(tiny_llama, reference, adapters, pairs, expected, tensor_parallel_size=2, enforce_eager=True)


def test_pipeline_parallel(two_cores, tiny_llama, reference, adapters, pairs, expected) -> None:
    """Compiled, since vLLM's CPU worker makes what a pipeline needs in its warm-up, which eager engines leave out."""
    check_parallel_engine(tiny_llama, reference, adapters, pairs, expected, pipeline_parallel_size=2)


@pytest.mark.slow
def test_tensor_parallel_compiled(two_cores, tiny_llama, reference, adapters, pairs, expected) -> None:
    check_parallel_engine(tiny_llama, reference, adapters, pairs, expected, tensor_parallel_size=2)


def test_data_parallel(two_cores, tiny_llama, adapters, pairs, expected, tmp_path) -> None:
    """Two engines behind one front end: adapters added once are in both, and each answers right on its own."""
    from vllm.lora.request import LoRARequest

    requests = {
        name: LoRARequest(name, number, str(adapter.save(tmp_path / str(number))))
        for number, (name, adapter) in enumerate(adapters.items())
        if adapter
    }
    answers = asyncio.run(_data_parallel_answers(tiny_llama, requests, pairs))
    for rank in range(2):
        np.testing.assert_allclose(answers[rank], expected, atol=TOLERANCE, err_msg=f"engine {rank}")


async def _data_parallel_answers(base: Path, requests, pairs) -> list[np.ndarray]:
    """Per engine the log-probabilities `[pairs, vocabulary]` of the first new tokens, all asked at once."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {"additional_config": {"reft": {"sites": "all"}}, "dtype": "float32", "enable_lora": True}
    arguments = AsyncEngineArgs(
        str(base), data_parallel_size=2, enforce_eager=True, max_logprobs=-1, **settings, **ENGINE
    )
    engine = AsyncLLM.from_engine_args(arguments)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)

    async def ask(number: int, rank: int) -> np.ndarray:
        prompt, name = pairs[number]
        stream = engine.generate(
            TokensPrompt(prompt_token_ids=prompt),
            params,
            f"{rank}-{number}",
            lora_request=requests.get(name),
            data_parallel_rank=rank,
        )
        final = [output async for output in stream][-1]
        row = final.outputs[0].logprobs[0]
        return np.array([row[token].logprob for token in range(len(row))])

    try:
        for request in requests.values():
            assert await engine.add_lora(request)
        asked = [ask(number, rank) for rank in range(2) for number in range(len(pairs))]
        rows = await asyncio.gather(*asked)
        return [np.stack(part) for part in _halves(rows)]
    finally:
        engine.shutdown()


def _halves(rows: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    middle = len(rows) // 2
    yield rows[:middle]
    yield rows[middle:]
