"""What schedulers do to requests: chunks, preemption, drafts, several answers, beams, aborts, cached beginnings.

Two engines, each with several of these at once; prompts that are prefilled in one step are in `test_vllm_matrix`.
"""

from __future__ import annotations

import numpy as np
import pytest
import vllm_environment  # noqa: F401
from matrix_adapters import edits_of_every_kind, prompts_of_every_kind, weights_of_every_kind
from reference_answers import TOLERANCE, Reference, check_answers
from strong_programs import Strong

import reft_plugins as reft
from reft_plugins.program import WeightDelta

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SHARED = {"max_model_len": 192, "max_loras": 4, "block_size": 32, "disable_log_stats": False}
SHORT_OF_MEMORY = {"max_num_batched_tokens": 16, "max_num_seqs": 12, "num_gpu_blocks_override": 14}
DRAFTING = {
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    },
}
COMPILED = [pytest.param(True, id="eager"), pytest.param(False, id="compiled", marks=pytest.mark.slow)]


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


@pytest.fixture(scope="module", params=COMPILED)
def scarce(tiny_llama, request):
    runtime = reft.runtime("vllm", tiny_llama, enforce_eager=request.param, **SHARED, **SHORT_OF_MEMORY)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module", params=COMPILED)
def drafting(tiny_llama, request):
    runtime = reft.runtime("vllm", tiny_llama, enforce_eager=request.param, **SHARED, **DRAFTING)
    yield runtime
    runtime.close()


def counted(engine, name: str) -> float:
    """One of vLLM's counters since the engine's start."""
    found = [metric for metric in engine.llm.get_metrics() if metric.name == name]
    assert found, f"vLLM counts no {name}"
    return sum(metric.value for metric in found)


def greedy(tokens: int, **settings):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=5, ignore_eos=True, **settings)


def random_prompts(seed: int, *lengths: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[1, *draw.integers(5, 500, size=length - 1).tolist()] for length in lengths]


def shuffled(adapters, prompts, seed: int = 0):
    pairs = [(prompt, adapter) for prompt in prompts for adapter in (*adapters.values(), None)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i][0] for i in order], [pairs[i][1] for i in order]


def test_chunks_of_sixteen_tokens_and_preemption_beyond_the_prompt(scarce, adapters, reference) -> None:
    """Twelve requests want more blocks than there are once they have generated, so that some start again."""
    before = counted(scarce, "vllm:num_preemptions")
    prompts, used = shuffled(adapters, random_prompts(1, 21, 40, 62))
    check_answers(reference, prompts, used, scarce._run(prompts, used, greedy(40)))
    assert counted(scarce, "vllm:num_preemptions") > before + 5


def test_cached_beginnings_under_eviction(scarce, adapters, reference) -> None:
    """Prompts that begin alike, in random order, in a cache that holds few of them: hits, partial hits, evictions."""
    from vllm import TokensPrompt

    (stem,) = random_prompts(2, 150)
    draw = np.random.default_rng(3)
    names = list(adapters)
    prompts, used, salts = [], [], []
    for _ in range(90):
        prompt = stem[: int(draw.choice([32, 33, 64, 90, 96, 128, 150]))]
        prompts.append(prompt if draw.random() < 0.7 else [*prompt[:-1], int(draw.integers(5, 500))])
        used.append(None if draw.random() < 0.15 else adapters[names[draw.integers(len(names))]])
        salts.append(draw.choice([None, "one", "two"], p=[0.6, 0.2, 0.2]))
    hits = counted(scarce, "vllm:prefix_cache_hits")
    inputs = [
        TokensPrompt(prompt_token_ids=prompt, **({"cache_salt": str(salt)} if salt else {}))
        for prompt, salt in zip(prompts, salts, strict=True)
    ]
    requests = [scarce._request(adapter) for adapter in used]
    outputs = scarce.llm.generate(inputs, greedy(3), lora_request=requests, use_tqdm=False)
    check_answers(reference, prompts, used, outputs)
    cached = [output.num_cached_tokens for output in outputs]
    assert counted(scarce, "vllm:prefix_cache_hits") > hits
    assert {0, 32} <= set(cached) and max(cached) >= 96


def test_salts_keep_caches_apart(scarce, adapters) -> None:
    from vllm import TokensPrompt

    (prompt,) = random_prompts(4, 100)
    adapter = adapters["loreft last, relu"]

    def cached(salt: str | None, used) -> int:
        given = TokensPrompt(prompt_token_ids=prompt, **({"cache_salt": salt} if salt else {}))
        output = scarce.llm.generate([given], greedy(1), lora_request=scarce._request(used), use_tqdm=False)
        return output[0].num_cached_tokens

    assert [cached("mine", None), cached("mine", adapter), cached("yours", adapter), cached(None, adapter)] == [
        0,
        96,
        0,
        0,
    ]


def test_abort_in_the_middle_of_a_prefill(scarce, adapters, reference) -> None:
    """What a request leaves half done in slots and cache does no harm to those after it."""
    from vllm import TokensPrompt

    llm, (long, short) = scarce.llm.llm_engine, random_prompts(5, 120, 50)
    used = list(adapters.values())[:8]
    for number, adapter in enumerate(used):
        request = scarce._request(adapter)
        llm.add_request(f"lost-{number}", TokensPrompt(prompt_token_ids=long), greedy(30), lora_request=request)
        for _ in range(number % 5):
            llm.step()
        llm.abort_request([f"lost-{number}"])
    for prompt in (long, short):
        batch = [prompt] * len(used)
        check_answers(reference, batch, used, scarce._run(batch, used, greedy(4)))


def test_prompt_log_probabilities_in_chunks(scarce, adapters, reference, tiny_llama) -> None:
    """Also under LoRA on the output layer, where vLLM computes the logits of one request at a time."""
    (prompt,) = random_prompts(6, 45)
    heads = [Strong(tiny_llama, seed) for seed in range(3)]
    used = [*list(adapters.values())[::3], *(head.adapter(output_layer(head)) for head in heads)]
    outputs = scarce._run([prompt] * len(used), used, greedy(1, prompt_logprobs=3))
    for adapter, output in zip(used, outputs, strict=True):
        for row, found in zip(reference.rows(prompt, adapter), output.prompt_logprobs[1:], strict=False):
            assert len(found) >= 3
            error = max(abs(row[token] - entry.logprob) for token, entry in found.items())
            assert error <= TOLERANCE, adapter.manifest.program


def output_layer(strong: Strong) -> WeightDelta:
    a, b = strong.normal(4, strong.identity.hidden_size) * 0.3, strong.normal(512, 4) * 0.3
    return WeightDelta("lm_head", a=a, b=b)


def test_drafts(drafting, adapters, reference) -> None:
    """Prompts that repeat themselves get drafts, some accepted and some not, under every kind of adapter."""
    draw = np.random.default_rng(7)
    loops = [[1, *(draw.integers(5, 500, size=size).tolist() * 12)][:length] for size, length in ((2, 30), (5, 50))]
    prompts, used = shuffled(adapters, loops)
    check_answers(reference, prompts, used, drafting._run(prompts, used, greedy(24)))
    drafted = counted(drafting, "vllm:spec_decode_num_draft_tokens")
    accepted = counted(drafting, "vllm:spec_decode_num_accepted_tokens")
    assert 20 < accepted < drafted - 20


def test_several_answers_to_one_prompt(drafting, adapters, reference) -> None:
    from vllm import SamplingParams

    prompts, used = shuffled(adapters, random_prompts(8, 37))
    params = SamplingParams(n=3, max_tokens=6, temperature=1.0, logprobs=3, ignore_eos=True)
    outputs = drafting._run(prompts, used, params)
    assert all(len(output.outputs) == 3 for output in outputs)
    assert np.mean([len({tuple(one.token_ids) for one in output.outputs}) for output in outputs]) > 2
    check_answers(reference, prompts, used, outputs, greedy=False)


def test_beam_search(drafting, adapters, reference) -> None:
    """vLLM sends each beam as a prompt of its own; positions still count the prompt that was asked."""
    from vllm import TokensPrompt
    from vllm.sampling_params import BeamSearchParams

    prompts, used = shuffled(adapters, random_prompts(9, 19))
    outputs = drafting.llm.beam_search(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True),
        lora_request=[drafting._request(adapter) for adapter in used],
    )
    compared, eos = 0, drafting.llm.get_tokenizer().eos_token_id
    for prompt, adapter, output in zip(prompts, used, outputs, strict=True):
        method = adapter.manifest.method if adapter else "base"
        scores = []
        for sequence in output.sequences:
            answer = sequence.tokens[len(prompt) :]
            rows = reference.rows(prompt, adapter, answer[:-1])[len(prompt) - 1 :]
            scores.append(rows[np.arange(4), answer].sum())
            assert abs(sequence.cum_logprob - scores[-1]) <= 4 * TOLERANCE, method
        wanted, margin = beams_of(reference, prompt, adapter, 3, 4, eos)
        if margin > 8 * TOLERANCE:
            np.testing.assert_allclose(scores, [score for score, _ in wanted], atol=4 * TOLERANCE, err_msg=method)
            compared += 1
    assert compared > len(prompts) / 2


def beams_of(
    reference, prompt, adapter, width: int, tokens: int, eos: int
) -> tuple[list[tuple[float, list[int]]], float]:
    """Beam search by hand: the best continuations with their log-probabilities, best first, and the smallest
    distance at which any beam was preferred to one that was dropped.

    vLLM prefers by log-probability per token and does not count an end of sequence, even if it is told to ignore it.
    """

    def per_token(beam: tuple[float, list[int]]) -> float:
        return beam[0] / (len(prompt) + len(beam[1]) - (beam[1][-1] == eos))

    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    margin = np.inf
    for _ in range(tokens):
        longer = []
        for score, answer in beams:
            row = reference.rows(prompt, adapter, answer)[-1]
            longer += [(score + float(row[token]), [*answer, int(token)]) for token in np.argsort(-row)[: 2 * width]]
        longer.sort(key=per_token, reverse=True)
        beams = longer[:width]
        margin = min(margin, (per_token(longer[width - 1]) - per_token(longer[width])) * len(prompt))
    return beams, margin
