"""From a store reference that this process has never seen to the first token under it, in an idle engine."""

from __future__ import annotations

import random
import time
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Take references one by one, each followed by a request to the bare base with the same prompt.

    Returns:
        per reference: milliseconds to find the adapter's files (`resolve`), to load it into the engine (`load`), of the
        request (`step`), of all three together (`total`), and of the base's request (`base`); and whether the
        token differed.
    """
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    from reft_plugins.references import resolve

    llm = LLM(**job["engine"])
    draw = random.Random(0)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)

    def token(prompt: list[int], request: Any) -> int:
        inputs = [TokensPrompt(prompt_token_ids=prompt)]
        output = llm.generate(inputs, params, lora_request=request, use_tqdm=False)[0]
        return int(output.outputs[0].token_ids[0])

    rows = []
    for number, reference in enumerate(job["references"]):
        prompt = [1, *(draw.randrange(3, job["vocabulary"]) for _ in range(job["prompt"] - 1))]
        started = time.perf_counter()
        path = resolve(reference)
        resolved = time.perf_counter()
        request = LoRARequest(reference, number + 1, str(path))
        llm.llm_engine.add_lora(request)
        loaded = time.perf_counter()
        edited = token(prompt, request)
        answered = time.perf_counter()
        llm.reset_prefix_cache()
        begun = time.perf_counter()
        bare = token(prompt, None)
        ended = time.perf_counter()
        spans = {
            "resolve": resolved - started,
            "load": loaded - resolved,
            "step": answered - loaded,
            "total": answered - started,
            "base": ended - begun,
        }
        rows.append({name: span * 1e3 for name, span in spans.items()} | {"changed": edited != bare})
    llm.llm_engine.engine_core.shutdown()
    return {"rows": rows}


if __name__ == "__main__":
    from answering import answering

    answering(main)
