"""A beam's positions count the prompt that was asked, not the tokens that beam search put behind it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import vllm_environment  # noqa: F401
from strong_adapters import strong_loreft

from reft_vllm.beams import ASKED, Beams, asked_length


def request(name: str, prompt: int, asked: object = None) -> SimpleNamespace:
    params = SimpleNamespace(extra_args=None if asked is None else {ASKED: asked, "other": 1})
    return SimpleNamespace(req_id=name, prompt_token_ids=list(range(prompt)), sampling_params=params)


@pytest.mark.parametrize("asked", [None, 0, -3, 10, 11, "5", 5.0, True, [5]])
def test_a_length_that_makes_no_sense_is_the_prompts(asked: object) -> None:
    assert asked_length(request("a", 10, asked).sampling_params, 10) == 10


def test_lengths_of_beams_and_of_others() -> None:
    beams = Beams()
    nothing = np.array([9, 12], np.int32)
    beams.follow(SimpleNamespace(scheduled_new_reqs=[request("plain", 9)], finished_req_ids=set()))
    assert beams.lengths(["plain", "other"], nothing, nothing * 0) is nothing
    began = [request("beam", 12, 7), request("plain", 9)]
    beams.follow(SimpleNamespace(scheduled_new_reqs=began, finished_req_ids=set()))
    in_front = np.array([0, 3], np.int32)
    assert beams.lengths(["plain", "beam"], np.array([9, 15], np.int32), in_front).tolist() == [9, 10]
    beams.follow(SimpleNamespace(scheduled_new_reqs=[], finished_req_ids={"beam"}))
    assert beams.lengths(["plain", "beam"], np.array([9, 15], np.int32), in_front).tolist() == [9, 15]


def test_a_beams_blocks_are_those_of_the_answer_that_it_continues(tiny_llama, tmp_path) -> None:
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
    lora = LoRARequest("a", 1, str(strong_loreft(tiny_llama, "l2", seed=1).save(tmp_path / "a")))

    def hashes(prompt: list[int], answer: list[int], asked: int | None) -> list[bytes]:
        params = SamplingParams(max_tokens=64, extra_args=None if asked is None else {ASKED: asked})
        hasher = kv_cache_utils.get_request_block_hasher(16, sha256_cbor)
        made = Request("r", prompt, params, None, lora_request=lora, block_hasher=hasher)
        made.append_output_token_ids(answer)
        return list(made.block_hashes)

    prompt, answer = list(range(5, 25)), list(range(30, 58))
    continued = hashes(prompt, answer, None)
    assert hashes([*prompt, *answer], [], len(prompt)) == continued
    assert len(continued) == 3
    assert hashes([*prompt, *answer], [], None)[1:] != continued[1:], "the negative control: a prompt of its own"
