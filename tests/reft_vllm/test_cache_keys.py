"""Prefix-cache keys through vLLM's own block hasher; the stock keys are the negative control."""

from __future__ import annotations

import pytest
import vllm_environment  # noqa: F401
from strong_adapters import strong_lora, strong_loreft

BLOCK = 16
PROMPT = list(range(5, 5 + 100))


@pytest.fixture(scope="module")
def hashes(tiny_llama, tmp_path_factory):
    """`hashes(adapter, prompt, stock=False)`: block hashes of a request as the scheduler computes them."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.request import Request

    from reft_vllm.admission import serve_base
    from reft_vllm.install import install

    install()
    serve_base(str(tiny_llama))
    kv_cache_utils.init_none_hash(sha256_cbor)
    patched = kv_cache_utils.generate_block_hash_extra_keys
    directory = tmp_path_factory.mktemp("keys")

    def compute(adapter, prompt, stock=False, salt=None):
        lora = None
        if adapter is not None:
            path = adapter.save(directory / adapter.digest[7:])
            lora = LoRARequest(adapter.digest, 1, str(path))
        kv_cache_utils.generate_block_hash_extra_keys = patched.__wrapped__ if stock else patched
        try:
            hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256_cbor)
            request = Request(
                "r", prompt, SamplingParams(max_tokens=4), None, lora_request=lora, block_hasher=hasher, cache_salt=salt
            )
            return list(request.block_hashes)
        finally:
            kv_cache_utils.generate_block_hash_extra_keys = patched

    return compute


def test_longer_prompt_does_not_share_the_edited_end_of_a_shorter_one(hashes, tiny_llama) -> None:
    last = strong_loreft(tiny_llama, "l1", seed=1)
    short, long = hashes(last, PROMPT[:32]), hashes(last, PROMPT[:64])
    assert short[0] == long[0], "nothing is edited in the first block of either"
    assert short[1] != long[1]
    stock_short, stock_long = hashes(last, PROMPT[:32], stock=True), hashes(last, PROMPT[:64], stock=True)
    assert stock_short[1] == stock_long[1], "the stock key would reuse the edited block"


def test_blocks_before_the_first_edit_are_shared_by_all_adapters_and_the_base(hashes, tiny_llama) -> None:
    base = hashes(None, PROMPT[:70])
    one, two = (hashes(strong_loreft(tiny_llama, "l2", seed=seed), PROMPT[:70]) for seed in (1, 2))
    assert one[:4] == two[:4] == base[:4]
    first = hashes(strong_loreft(tiny_llama, "f2+l2", seed=1), PROMPT[:70])
    assert not set(first) & set(base), "an edit in the first block changes all that follow"
    stock = hashes(strong_loreft(tiny_llama, "l2", seed=1), PROMPT[:70], stock=True)
    assert not set(stock) & set(base)


def test_versions_and_weight_deltas_have_keys_of_their_own(hashes, tiny_llama) -> None:
    first, second = (hashes(strong_loreft(tiny_llama, "f1", seed=seed), PROMPT[:40]) for seed in (1, 2))
    assert not set(first) & set(second)
    base = hashes(None, PROMPT[:40])
    assert not set(hashes(strong_lora(tiny_llama, seed=1), PROMPT[:40])) & set(base)
    assert hashes(strong_lora(tiny_llama, seed=1), PROMPT[:40]) != hashes(strong_lora(tiny_llama, seed=2), PROMPT[:40])


def test_generated_positions_and_salts(hashes, tiny_llama) -> None:
    generated = strong_loreft(tiny_llama, "generated", seed=1)
    assert hashes(generated, PROMPT[:40]) == hashes(None, PROMPT[:40])
    everywhere = hashes(strong_loreft(tiny_llama, "all", seed=1), PROMPT[:40])
    assert not set(everywhere) & set(hashes(None, PROMPT[:40]))
    assert hashes(generated, PROMPT[:40], salt="a") != hashes(generated, PROMPT[:40])
