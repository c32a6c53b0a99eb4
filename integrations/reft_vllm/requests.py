"""Requests as they enter an engine: bound to one version of their adapter, which they hold until they are finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from reft_vllm.admission import Admitted, admit, exact, is_adapter, serve_base
from reft_vllm.guard import FAILURES
from reft_vllm.versions import Numbers, StrengthError, checked_strength

NUMBERS = Numbers()
STRENGTH = "reft_strength"
"""The extra argument of a request that scales what its adapter does."""

_given: dict[int, int] = {}
_checked: WeakKeyDictionary[Admitted, set[int]] = WeakKeyDictionary()


def pinned(lora: Any) -> Any:
    """A `LoRARequest` that names one version: its path carries the digest, its number follows from the content.

    Raises:
        AdapterError: a bare directory holds no adapter that can be trusted.
    """
    import msgspec

    version = exact(lora.lora_path)
    number = NUMBERS.of(version.key)
    _given[lora.lora_int_id] = number
    return msgspec.structs.replace(lora, lora_int_id=number, lora_path=str(version), load_inplace=False)


def number_of(lora_id: int) -> int:
    """The number behind one that a caller chose for an adapter of ours; others are what they are."""
    return _given.get(lora_id, lora_id)


def asked_strength(lora: Any, extra: Mapping[str, Any] | None) -> float | None:
    """The strength that a request's extra arguments ask for; None where they do not.

    Raises:
        StrengthError: it is no strength, or the request runs under no adapter of ours.
    """
    value = (extra or {}).get(STRENGTH)
    if value is None:
        return None
    strength = checked_strength(value)
    if lora is None or not is_adapter(lora.lora_path):
        raise StrengthError(f"{STRENGTH} scales what an adapter of reft-plugins does; this model is none")
    return strength


def at_strength(lora: Any, extra: Mapping[str, Any] | None) -> Any:
    """The LoRA request at the strength that a request's extra arguments ask for; as it is where they do not.

    Raises:
        StrengthError: see `asked_strength`.
    """
    strength = asked_strength(lora, extra)
    if strength is None:
        return lora
    import msgspec

    version = exact(lora.lora_path).at(strength)
    return msgspec.structs.replace(lora, lora_int_id=NUMBERS.of(version.key), lora_path=str(version))


def checked(lora: Any, vllm_config: Any, extra: Mapping[str, Any] | None = None) -> Any:
    """The LoRA request of one of our adapters, pinned, after every check that needs no worker; others as they are.

    Args:
        extra: arguments of the request that vLLM does not know.

    Raises:
        ReftError: the adapter cannot run in this engine.
    """
    serve_base(vllm_config.model_config.model)
    lora = at_strength(lora, extra)
    if lora is None or vllm_config.lora_config is None or not is_adapter(lora.lora_path):
        return lora
    from reft_vllm.loading import check_program
    from reft_vllm.placeholders import check_engine
    from reft_vllm.settings import Settings

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
        if held is not None and FAILURES[held.digest]:
            held = replace(held, digest=f"{held.digest} {FAILURES[held.digest]}")
        request.reft_adapter = held
    return held
