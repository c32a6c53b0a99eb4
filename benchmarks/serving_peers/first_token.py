"""From a store reference that this process has never seen to the first token under it, in an idle engine."""

from __future__ import annotations

import random
import time
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Take references one by one, each followed by a request to the bare base with the same prompt.

    Returns:
        per reference: milliseconds to find the adapter's files (`resolve`), to load it into the engine (`load`), of the
        request (`step`), of all three together (`total`), and of the base's request (`base`), each by the clock and in
        processor time (`resolve cpu`, …); and whether the token differed. The first `warm_up` references, during which
        libraries are imported, are left out.
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
        started = _clocks()
        path = resolve(reference)
        resolved = _clocks()
        request = LoRARequest(reference, number + 1, str(path))
        llm.llm_engine.add_lora(request)
        loaded = _clocks()
        edited = token(prompt, request)
        answered = _clocks()
        llm.reset_prefix_cache()
        begun = _clocks()
        bare = token(prompt, None)
        ended = _clocks()
        spans = {
            "resolve": (started, resolved),
            "load": (resolved, loaded),
            "step": (loaded, answered),
            "total": (started, answered),
            "base": (begun, ended),
        }
        wall = {name: (stop[0] - start[0]) * 1e3 for name, (start, stop) in spans.items()}
        processor = {f"{name} cpu": (stop[1] - start[1]) * 1e3 for name, (start, stop) in spans.items()}
        rows.append(wall | processor | {"changed": edited != bare})
    llm.llm_engine.engine_core.shutdown()
    return {"rows": rows[job["warm_up"] :]}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    from answering import answering

    answering(main)
