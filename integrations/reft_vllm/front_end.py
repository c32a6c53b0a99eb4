"""The OpenAI server's `/v1/load_lora_adapter`: store references as paths, and 4xx answers for adapters at fault."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from reft_plugins.errors import ReftError, UnknownReferenceError
from reft_plugins.references import resolve
from reft_vllm.admission import admit, is_adapter, serve_base


async def checked_load(models: Any, original: Callable[..., Any], request: Any, base_model_name: str | None) -> Any:
    """Check an adapter in the server's own process, then let vLLM load it.

    Returns:
        vLLM's answer; an error answer with status 404 for an unknown reference and 400 for an adapter that cannot run.
    """
    from vllm.entrypoints.openai.models.serving import create_error_response  # where every version has it

    def refuse(error: object, status: HTTPStatus) -> Any:
        return create_error_response(message=str(error), err_type="BadRequestError", status_code=status)

    try:
        path = str(await asyncio.to_thread(resolve, request.lora_path)) if request.lora_path else ""
        ours = is_adapter(path)
        if ours:
            request.lora_path = path
            serve_base(models.model_config.model)
            await asyncio.to_thread(admit, path, request.load_inplace)
    except UnknownReferenceError:
        ours = False  # a hub id, or nothing: vLLM's own answer is right for both
    except ReftError as error:
        return refuse(error, HTTPStatus.BAD_REQUEST)
    answer = await original(models, request, base_model_name)
    status = getattr(getattr(answer, "error", None), "code", None)
    if ours and status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return refuse(answer.error.message, HTTPStatus.BAD_REQUEST)
    return answer
