"""Activations as request output: `"vllm_xargs": {"reft_capture": "3:block_output,5:mlp_output@l1"}`.

A request names sites and positions; its answer carries the activations there, after the edits of its adapter, in
`kv_transfer_params["reft_capture"]`, the field of vLLM's answers that is meant for such extra data.
"""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reft_plugins.capturing import parse_site
from reft_plugins.errors import ReftError, UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Site, canonical
from reft_vllm.execution.captures import CAPTURE
from reft_vllm.settings import Settings

MAX_BYTES = int(os.environ.get("REFT_CAPTURE_BYTES", str(64 << 20)))
"""Largest answer of one request, in bytes of float32."""

Taken = dict[str, tuple[list[int], npt.NDArray[np.float32]]]


def asked(sites: Sequence[Site], positions: Positions, vllm_config: Any) -> dict[str, Any]:
    """The extra argument of a request that captures.

    Raises:
        UnsupportedProgramError: the engine was started without one of the sites, or cannot return activations.
    """
    installed = {canonical(name) for name in Settings.of(vllm_config.additional_config).sites}
    for site in sites:
        if canonical(site.component) not in installed:
            raise UnsupportedProgramError(
                f"{site}: this engine was started without that site; name {site.component} among its sites"
            )
        layers = vllm_config.model_config.hf_text_config.num_hidden_layers
        if site.layer >= layers:
            raise UnsupportedProgramError(f"{site}: the model has layers 0 to {layers - 1}")
    if vllm_config.lora_config is None:
        raise UnsupportedProgramError("activations are captured by engines that serve adapters (--enable-lora)")
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise UnsupportedProgramError("activations are not captured with data parallelism: engines answer apart")
    names = [f"{site.layer}.{canonical(site.component)}" for site in sites]
    return {"key": uuid.uuid4().hex, "sites": names, "positions": str(positions)}


def parse(text: object) -> tuple[list[Site], Positions]:
    """Sites and positions of `3:block_output,5:mlp_output@l1`; without `@` the last token of the prompt.

    Raises:
        ReftError: naming what does not parse.
    """
    if not isinstance(text, str) or not text:
        raise UnsupportedProgramError(f"{CAPTURE} must be text such as '3:block_output@l1', not {text!r}")
    sites, _, positions = text.partition("@")
    return [parse_site(site) for site in sites.split(",")], Positions.parse(positions or "l1")


def capturing(sampling_params: Any, argument: dict[str, Any]) -> Any:
    """A copy of sampling parameters that asks for activations; cached tokens are computed again, to be seen."""
    copy = sampling_params.clone()
    copy.extra_args = {**(copy.extra_args or {}), CAPTURE: argument}
    copy.skip_reading_prefix_cache = True
    return copy


def merge(workers: Sequence[dict[str, tuple[list[int], bytes]]], last_position: int) -> Taken:
    """One answer of all ranks: pipeline ranks hold different layers, tensor-parallel ranks equal or side-by-side parts.

    Args:
        workers: per rank, positions and rows of float32 by site, from `reft_captured`.
        last_position: tokens after it were drafts that speculative decoding threw away.
    """
    merged: Taken = {}
    for site in dict.fromkeys(site for taken in workers for site in taken):
        parts = [taken[site] for taken in workers if site in taken]
        positions = [position for position in parts[0][0] if position <= last_position]
        rows = [np.frombuffer(data, np.float32).reshape(len(own), -1)[: len(positions)] for own, data in parts]
        sharded = site.endswith((".attention_value_output", ".mlp_activation"))
        merged[site] = positions, np.concatenate(rows, axis=1) if sharded else rows[0]
    return merged


def encoded(taken: Taken) -> dict[str, Any]:
    """As JSON: per site `positions`, `shape`, `dtype` and base64 `data`, little-endian and row by row."""
    size = sum(values.nbytes for _, values in taken.values())
    if size > MAX_BYTES:
        return {"error": f"{size} bytes of activations exceed REFT_CAPTURE_BYTES={MAX_BYTES}; ask for fewer positions"}
    return {
        site.replace(".", ":"): {
            "positions": positions,
            "shape": list(values.shape),
            "dtype": "float32",
            "data": base64.b64encode(values.astype("<f4").tobytes()).decode(),
        }
        for site, (positions, values) in taken.items()
    }


async def answering(
    engine: Any, original: Callable[..., AsyncGenerator[Any, None]], sampling_params: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[Any, None]:
    """vLLM's stream of outputs, the last of which carries the activations.

    Args:
        original: makes the stream from sampling parameters and the remaining arguments.

    Raises:
        ValueError: what is asked for cannot be read or captured; the server answers 400.
    """
    try:
        argument = asked(*parse(sampling_params.extra_args[CAPTURE]), engine.vllm_config)
    except ReftError as error:
        raise ValueError(str(error)) from error
    async for output in original(capturing(sampling_params, argument), *args, **kwargs):
        if output.finished:
            last = len(output.prompt_token_ids) + max(len(one.token_ids) for one in output.outputs) - 2
            workers = await engine.collective_rpc("reft_captured", args=(argument["key"],))
            found = encoded(merge(workers, last))
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), CAPTURE: found}
        yield output
