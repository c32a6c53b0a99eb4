"""Prefix-cache keys of prompts with images: our key joins vLLM's own, and takes the place of nothing but the LoRA's."""

from __future__ import annotations

import pytest
import vllm_environment  # noqa: F401
from strong_adapters import strong_lora, strong_loreft

from reft_vllm.cache_keys import replace_key

BLOCK = 16
PROMPT = list(range(5, 5 + 70))


@pytest.fixture(scope="module")
def hashes(tiny_llama, tmp_path_factory):
    """`hashes(adapter, image)`: block hashes of a prompt whose tokens 18 to 27 stand for an image."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.request import Request

    from reft_vllm.admission import serve_base
    from reft_vllm.install import install

    install()
    serve_base(str(tiny_llama))
    kv_cache_utils.init_none_hash(sha256_cbor)
    folder = tmp_path_factory.mktemp("adapters")

    def compute(adapter, image, salt=None):
        lora = None
        if adapter is not None:
            lora = LoRARequest("a", 1, str(adapter.save(folder / adapter.digest[7:])))
        features = [MultiModalFeatureSpec(None, "image", image, PlaceholderRange(18, 10))] if image else None
        hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256_cbor)
        params = SamplingParams(max_tokens=4)
        made = Request(
            "r",
            PROMPT,
            params,
            None,
            mm_features=features,
            lora_request=lora,
            cache_salt=salt,
            block_hasher=hasher,
        )
        return list(made.block_hashes)

    return compute


def test_images_keep_blocks_apart_under_every_adapter(hashes, tiny_llama) -> None:
    for adapter in (None, strong_loreft(tiny_llama, "f2+l2", seed=1), strong_lora(tiny_llama, seed=2)):
        cat, dog, none = (hashes(adapter, image) for image in ("cat", "dog", None))
        assert len(cat) == 4
        assert cat[0] == dog[0] == none[0], "the image begins in the second block"
        assert len({cat[1], dog[1], none[1]}) == 3


def test_images_before_the_first_edit_are_shared_with_the_base(hashes, tiny_llama) -> None:
    last = strong_loreft(tiny_llama, "l10", seed=3)
    assert hashes(last, "cat")[:3] == hashes(None, "cat")[:3]
    assert hashes(last, "cat")[3] != hashes(None, "cat")[3], "tokens 60 to 69 are edited"
    assert hashes(last, "cat", salt="mine")[:3] == hashes(None, "cat", salt="mine")[:3]
    assert hashes(last, "cat", salt="mine")[0] != hashes(last, "cat")[0]


def test_only_the_key_of_the_lora_is_replaced() -> None:
    others = (("lora", "name"), ("mm", "cat", 3), ("cache_salt", "mine"))
    assert replace_key(others, ("reft", "x")) == (("mm", "cat", 3), ("cache_salt", "mine"), ("reft", "x"))
    assert replace_key(others, None) == (("mm", "cat", 3), ("cache_salt", "mine"))
    assert replace_key((("lora", "name"),), None) is None
    assert replace_key(None, ("reft", "x")) == (("reft", "x"),)
