"""One vLLM engine in a process of its own: settings as the first line of input, then a job per line, answers likewise.

The process imports nothing of this project by itself; whether the plugin is there is up to `VLLM_PLUGINS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes to the error stream
    settings = json.loads(sys.stdin.readline())
    from vllm import LLM

    llm = LLM(**settings)
    answers.write(json.dumps(_facts(llm)) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        answers.write(json.dumps(JOBS[job.pop("job")](llm, **job)) + "\n")
    llm.llm_engine.engine_core.shutdown()


def _facts(llm: Any) -> dict[str, Any]:
    from vllm import __version__

    config = llm.llm_engine.vllm_config
    compiled = not config.model_config.enforce_eager and config.compilation_config.mode.name != "NONE"
    graphs = getattr(config.compilation_config.cudagraph_mode, "name", None) if compiled else None
    return {"vllm": __version__, "compiled": compiled, "cuda_graphs": graphs, "plugin": "reft_vllm" in sys.modules}


def run(llm: Any, prompts: list[list[int]], adapters: list[list[Any] | None], new_tokens: int) -> dict[str, Any]:
    """Answer all prompts as one batch from an empty prefix cache; `adapters` are `[name, number, path]` or null.

    Returns:
        wall and processor seconds, token counts, and the new tokens of every prompt.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    llm.reset_prefix_cache()
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    requests = [None if adapter is None else LoRARequest(*adapter) for adapter in adapters]
    started, worked = time.perf_counter(), time.process_time()
    outputs = llm.generate(inputs, params, lora_request=requests, use_tqdm=False)
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - worked
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "prompt_tokens": sum(map(len, prompts)),
        "prefilled_tokens": sum(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs),
        "new_tokens": sum(map(len, answers)),
        "answers": answers,
    }


def statistics(llm: Any) -> dict[str, Any]:
    """The plugin's counters since the start."""
    counters: dict[str, Any] = llm.collective_rpc("reft_statistics")[0]
    return counters


JOBS = {"run": run, "statistics": statistics}

if __name__ == "__main__":
    main()
