"""Requests as they enter an engine: bound to one version of their adapter, which they hold until they are finished."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from reft_vllm.admission import Admitted, admit, exact, is_adapter, serve_base
from reft_vllm.versions import Numbers

NUMBERS = Numbers()
_checked: WeakKeyDictionary[Admitted, set[int]] = WeakKeyDictionary()


def pinned(lora: Any) -> Any:
    """A `LoRARequest` that names one version: its path carries the digest, its number follows from the content.

    Raises:
        AdapterError: a bare directory holds no adapter that can be trusted.
    """
    from msgspec.structs import replace

    version = exact(lora.lora_path)
    return replace(lora, lora_int_id=NUMBERS.of(version.key), lora_path=str(version), load_inplace=False)


def checked(lora: Any, vllm_config: Any) -> Any:
    """The LoRA request of one of our adapters, pinned, after every check that needs no worker; others as they are.

    Raises:
        ReftError: the adapter cannot run in this engine.
    """
    if lora is None or not is_adapter(lora.lora_path):
        return lora
    from reft_vllm.loading import check_program
    from reft_vllm.placeholders import check_engine
    from reft_vllm.settings import Settings

    serve_base(vllm_config.model_config.model)
    lora = pinned(lora)
    admitted = admit(lora.lora_path)
    engines = _checked.setdefault(admitted, set())
    if id(vllm_config) not in engines:
        settings = Settings.of(vllm_config.additional_config)
        check_program(admitted.program, vllm_config.lora_config.max_lora_rank, settings)
        check_engine(admitted.program, vllm_config.model_config)
        engines.add(id(vllm_config))
    return lora


def admitted_of(request: Any) -> Admitted | None:
    """The adapter of a scheduler's `Request`, looked up once; the request holds it from then on.

    Returns:
        None for the base model and for LoRAs of others.
    """
    try:
        held: Admitted | None = request.reft_adapter
    except AttributeError:
        lora = request.lora_request
        held = admit(lora.lora_path) if lora is not None and is_adapter(lora.lora_path) else None
        request.reft_adapter = held
    return held
