"""Virtual tokens and key/value prefixes in a real engine against the transformers runtime.

The token budget is smaller than most prompts, so that placeholders and prompts are prefilled in chunks; prefix caching
is on; there are fewer slots than adapters. Every adapter changes most answers, which the negative controls check.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_environment  # noqa: F401
from scipy.special import log_softmax
from strong_adapters import strong_lora, strong_loreft

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import KeyValuePrefix, Node, Program, VirtualTokens

TOLERANCE = 1e-3
SLOTS, BUDGET, BLOCK, CONTEXT = 4, 24, 32, 256
LAYERS, HEADS, KV_HEADS, SIZE, HIDDEN = 4, 4, 2, 32, 128


def virtual(count: int, seed: int) -> list[Node]:
    return [VirtualTokens(torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)))]


def prefix(count: int, seed: int, layers: range = range(LAYERS)) -> list[Node]:
    return [KeyValuePrefix(layer, *pairs(count, 10 * seed + layer)) for layer in layers]


def gated(count: int, seed: int, projected: bool = True, gates: int = HEADS) -> list[Node]:
    draw = torch.Generator().manual_seed(seed)
    return [
        KeyValuePrefix(layer, *pairs(count, 100 * seed + layer), torch.randn(gates, generator=draw) * 2, projected)
        for layer in (1, 3)
    ]


def pairs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, KV_HEADS, SIZE, generator=draw) * 1.5, torch.randn(count, KV_HEADS, SIZE, generator=draw)


@pytest.fixture(scope="module")
def adapters(tiny_llama) -> dict[str, Adapter | None]:
    identity = identify(tiny_llama)
    first_and_last = list(strong_loreft(tiny_llama, "f2+l2", seed=1).lower())
    lora = strong_lora(tiny_llama, seed=3)
    programs = {
        "virtual": virtual(5, 1),
        "more virtual than the budget": virtual(BUDGET + 13, 2),
        "prefix": prefix(7, 3),
        "more pairs than a block": prefix(BLOCK + 3, 4),
        "gated": gated(5, 5),
        "gated behind the projection": gated(9, 6, projected=False, gates=1),
        "two gated": [*gated(3, 7), *gated(4, 8), *gated(2, 9, projected=False)],
        "virtual and edits": [*virtual(6, 10), *first_and_last],
        "everything": [*prefix(3, 11), *virtual(4, 12), *gated(5, 13), *first_and_last, *lora.lower()],
    }
    made = {name: adapter_of(Program(tuple(nodes)), identity) for name, nodes in programs.items()}
    return {"base": None, "lora": lora, "edits": strong_loreft(tiny_llama, "f2+l2", seed=2), **made}


@pytest.fixture(scope="module")
def reference(tiny_llama):
    return reft.runtime("transformers", tiny_llama)


@pytest.fixture(scope="module")
def engine(tiny_llama):
    runtime = reft.runtime(
        "vllm",
        tiny_llama,
        max_model_len=CONTEXT,
        max_loras=SLOTS,
        max_lora_rank=8,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=16,
        block_size=BLOCK,
        enable_prefix_caching=True,
    )
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [[1, *draw.integers(5, 500, size=size - 1).tolist()] for size in (1, 2, 8, 17, 32, 41, 64, 100)]


@pytest.fixture(scope="module")
def expected(reference):
    """Log-probabilities of the reference, each computed once."""
    known: dict[object, np.ndarray] = {}

    def compute(prompt: list[int], adapter: Adapter | None) -> np.ndarray:
        key = tuple(prompt), adapter and adapter.digest
        if key not in known:
            known[key] = log_softmax(reference.logits(prompt, adapter), axis=-1)
        return known[key]

    return compute


def answers(engine, prompts, adapters, **params):
    from vllm import SamplingParams

    return engine._run(prompts, adapters, SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params}))


def test_log_probabilities_of_whole_prompts(engine, expected, adapters, prompts) -> None:
    for name, adapter in adapters.items():
        for prompt in (prompts[0], prompts[5]):
            want = expected(prompt, adapter)
            got = engine.logits(prompt, adapter)
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=name)
        if adapter:
            change = np.abs(want - expected(prompt, None))
            assert change[-1].max() > 1, f"{name} is too weak to test"


def test_mixed_batches_with_more_adapters_than_slots(engine, expected, adapters, prompts) -> None:
    work = [(prompt, adapter) for prompt in prompts for adapter in adapters.values()]
    want = np.stack([expected(prompt, adapter)[-1] for prompt, adapter in work])
    assert len(adapters) - 1 > SLOTS
    for seed in range(2):
        engine.llm.reset_prefix_cache()
        order = np.random.default_rng(seed).permutation(len(work))
        got = engine.next_logprobs([work[i][0] for i in order], [work[i][1] for i in order])
        np.testing.assert_allclose(got, want[order], atol=TOLERANCE)
    assert engine.statistics()["most_adapters"] == SLOTS


def test_generated_tokens_equal_and_differ_from_the_base(engine, reference, adapters, prompts) -> None:
    work = [(prompt, adapter) for prompt in prompts[2:6] for adapter in adapters.values() if adapter]
    batch, used = [prompt for prompt, _ in work], [adapter for _, adapter in work]
    want = [answer.token_ids for answer in reference.generate(batch, used, max_new_tokens=10, ignore_eos=True)]
    bare = [answer.token_ids for answer in reference.generate(batch, max_new_tokens=10, ignore_eos=True)]
    got = answers(engine, batch, used, max_tokens=10)
    assert [list(output.outputs[0].token_ids) for output in got] == want
    assert np.mean([np.not_equal(w, b).mean() for w, b in zip(want, bare, strict=True)]) > 0.5


def test_several_samples_of_one_prompt(engine, reference, adapters, prompts) -> None:
    for name in ("virtual", "prefix", "everything"):
        (output,) = answers(engine, [prompts[3]], [adapters[name]], max_tokens=8, n=3, temperature=1.0, logprobs=0)
        assert len({tuple(choice.token_ids) for choice in output.outputs}) > 1
        for choice in output.outputs:
            tokens = list(choice.token_ids)
            scores = reference.logits([*prompts[3], *tokens], adapters[name], prompt_length=len(prompts[3]))
            want = log_softmax(scores, axis=-1)[len(prompts[3]) - 1 : -1][range(8), tokens]
            got = [row[token].logprob for row, token in zip(choice.logprobs, tokens, strict=True)]
            np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=name)


def test_outputs_do_not_show_placeholders(engine, adapters, prompts) -> None:
    engine.llm.reset_prefix_cache()
    for name, adapter in adapters.items():
        for prompt in (prompts[0], prompts[2]):
            (output,) = answers(engine, [prompt], [adapter], max_tokens=2, prompt_logprobs=1)
            assert output.prompt_token_ids == prompt, name
            assert len(output.prompt_logprobs) == len(prompt)
            assert output.prompt_logprobs[0] is None
            for token, row in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
                assert token in row
            assert output.num_cached_tokens == 0


def test_prefix_cache_holds_placeholders_of_one_adapter(engine, expected, adapters, prompts) -> None:
    """From the cache as computed; only real tokens are reported as cached."""
    prompt = prompts[7]
    engine.llm.reset_prefix_cache()
    for turn in range(2):
        for name, adapter in adapters.items():
            (output,) = answers(engine, [prompt], [adapter], max_tokens=1, logprobs=-1)
            row = output.outputs[0].logprobs[0]
            got = np.array([row[token].logprob for token in range(len(row))])
            np.testing.assert_allclose(got, expected(prompt, adapter)[-1], atol=TOLERANCE, err_msg=name)
            front = adapter.lower().in_front if adapter else 0
            held = (len(prompt) + front - 1) // BLOCK * BLOCK
            if turn and name not in ("everything", "edits", "virtual and edits"):  # their last tokens are edited
                assert output.num_cached_tokens == max(held - front, 0), name
            elif not turn and name != "base":
                assert output.num_cached_tokens == 0, name


def test_longer_prompt_sharing_all_blocks_of_a_shorter_one(engine, expected, adapters) -> None:
    """Placeholders move the blocks, and edited last tokens of the shorter prompt are not those of the longer."""
    draw = np.random.default_rng(1)
    long = [1, *draw.integers(5, 500, size=4 * BLOCK - 1).tolist()]
    for name in ("virtual", "virtual and edits", "everything"):
        front = adapters[name].lower().in_front
        for length in (2 * BLOCK - front, 3 * BLOCK - front, 4 * BLOCK - front):
            got = engine.next_logprobs([long[:length]], [adapters[name]])[0]
            np.testing.assert_allclose(got, expected(long[:length], adapters[name])[-1], atol=TOLERANCE, err_msg=name)


def test_penalties_do_not_see_placeholders(engine, tiny_llama, prompts) -> None:
    """Learned rows that are the embeddings of a text: a request then answers as one with that text in front."""
    from reft_plugins.base_model import BaseModel

    embeddings = BaseModel.open(tiny_llama).tensor("model.embed_tokens.weight")
    prompt, text = prompts[3], [7, 8, 9]
    adapter = adapter_of(Program((VirtualTokens(embeddings[text].clone()),)), identify(tiny_llama))
    settings = {"max_tokens": 12, "repetition_penalty": 1.4}
    (shown,) = answers(engine, [prompt], [adapter], **settings)
    (plain,) = answers(engine, [[*text, *prompt]], [None], max_tokens=12)
    (unpenalised,) = answers(engine, [prompt], [adapter], max_tokens=12)
    assert unpenalised.outputs[0].token_ids == plain.outputs[0].token_ids
    assert shown.outputs[0].token_ids != unpenalised.outputs[0].token_ids


def test_context_is_shared_with_placeholders(engine, adapters, prompts, expected) -> None:
    from vllm.exceptions import VLLMValidationError

    adapter = adapters["more pairs than a block"]
    front = adapter.lower().in_front
    longest = [1, *np.random.default_rng(3).integers(5, 500, size=CONTEXT - front - 2).tolist()]
    (output,) = answers(engine, [longest], [adapter], max_tokens=50)
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"
    with pytest.raises(VLLMValidationError, match=f"puts {front} in front.*{CONTEXT - front - 1} tokens"):
        answers(engine, [[*longest, 5]], [adapter], max_tokens=1)
    np.testing.assert_allclose(engine.logits(prompts[2], adapter), expected(prompts[2], adapter), atol=TOLERANCE)


def test_what_cannot_be_served_is_refused(engine, expected, adapters, prompts, tiny_llama, tmp_path: Path) -> None:
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    some = adapter_of(Program(tuple(prefix(3, 1, layers=range(1, LAYERS)))), identify(tiny_llama))
    with pytest.raises(UnsupportedProgramError, match="layer 0 has no key/value pairs"):
        engine.logits(prompts[2], some)
    request = LoRARequest("some", 999, str(some.save(tmp_path / "some")))
    (output,) = engine.llm.generate(
        [TokensPrompt(prompt_token_ids=prompts[2])], SamplingParams(max_tokens=2), lora_request=request, use_tqdm=False
    )
    assert output.outputs[0].finish_reason == "error"
    np.testing.assert_allclose(
        engine.logits(prompts[2], adapters["prefix"]), expected(prompts[2], adapters["prefix"]), atol=TOLERANCE
    )
