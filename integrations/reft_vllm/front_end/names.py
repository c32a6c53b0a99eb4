"""Which version each model name of the server stands for, and how it comes to stand for another one."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from reft_plugins.errors import ReftError, UnknownReferenceError
from reft_plugins.manifest import Manifest
from reft_plugins.references import resolve
from reft_vllm.admission import Stamp, admit, exact, is_adapter, serve_base, stamp_of
from reft_vllm.requests import NUMBERS
from reft_vllm.versions import Version, checked_strength

logger = logging.getLogger("vllm.reft")

RESOLVE_SECONDS = float(os.environ.get("REFT_RESOLVE_SECONDS", "1.0"))
"""How long a name that the store resolved may stand for a version from which its tag has moved away."""

RETRY_SECONDS = 0.5
"""A directory that changed and cannot be read (it may be half written) is not tried again before."""


@dataclass(slots=True)
class Served:
    """What a model name stands for.

    Attributes:
        reference: path or store reference it was loaded from; follows: whether the name moves when the reference does.
        version, manifest: what it stands for now.
        stamp: of the directory's manifest when it was read.
        checked: when the reference was last looked at, in seconds of the monotonic clock.
    """

    reference: str
    follows: bool
    version: Version
    manifest: Manifest
    stamp: Stamp | None
    checked: float = field(default_factory=time.monotonic)

    @property
    def moved(self) -> bool:
        """Whether it may stand for another version by now; a look at one file, or less."""
        age = time.monotonic() - self.checked
        if self.follows:
            return age > RESOLVE_SECONDS
        return age > RETRY_SECONDS and stamp_of(self.version.directory) not in (self.stamp, None)


def find(reference: str, base: str) -> Served | None:
    """What a path or store reference stands for, read and checked; None where it is no adapter of ours.

    Args:
        base: the served model.

    Raises:
        UnknownReferenceError: it stands for nothing.
        ReftError: it stands for an adapter that cannot run on that base.
    """
    exactly = Version.parse(reference)
    path = reference if exactly.digest is not None else os.path.abspath(resolve(reference))
    if not is_adapter(path):
        return None
    checked_strength(exactly.strength)
    serve_base(base)
    stamp = stamp_of(exactly.directory if exactly.digest is not None else path)
    version = exact(path)
    return Served(reference, False, version, admit(str(version)).manifest, stamp)


def served_by(models: Any) -> dict[str, Served]:
    """Names of our adapters of vLLM's `OpenAIServingModels`."""
    found: dict[str, Served] = models.__dict__.setdefault("reft_served", {})
    return found


def refuse(error: object, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> Any:
    """An error answer of the server."""
    from vllm.entrypoints.openai.models.serving import create_error_response  # where every version has it

    return create_error_response(message=str(error), err_type="BadRequestError", status_code=status)


async def load(models: Any, original: Callable[..., Any], request: Any, base_model_name: str | None) -> Any:
    """`/v1/load_lora_adapter`: paths and store references; with `load_inplace` a name goes over to another version.

    Returns:
        vLLM's answer; an error answer with status 404 for an unknown reference and 400 for an adapter that cannot run.
    """
    reference = request.lora_path
    if reference and "://" in reference:
        return refuse(
            f"{reference}: a request loads folders and references of the store, nothing from an address of its choice. "
            "Bring it into the store with `reft store pull` first"
        )
    try:
        found = await asyncio.to_thread(find, reference, models.model_config.model) if reference else None
    except UnknownReferenceError:
        found = None  # a hub id, or nothing: vLLM's own answer is right for both
    except ReftError as error:
        return refuse(error)
    if found is None:
        return await original(models, request, base_model_name)
    name = request.lora_name
    async with models.lora_resolver_lock[name]:
        wrong = await models._check_load_lora_adapter_request(request)
        if wrong is not None:
            return wrong
        try:
            changed = await stand_for(models, name, found, base_model_name)
        except Exception as error:
            return refuse(error)
    return f"Success: LoRA adapter '{name}' {'added successfully' if changed else 'is of this version already'}."


async def unload(models: Any, original: Callable[..., Any], request: Any) -> Any:
    """`/v1/unload_lora_adapter`: requests in flight finish; workers forget the adapter as soon as none is left."""
    lora = models.lora_requests.get(request.lora_name)
    answer = await original(models, request)
    if lora is not None and request.lora_name not in models.lora_requests:
        served_by(models).pop(request.lora_name, None)
        await _retire(models, lora)
    return answer


async def stand_for(models: Any, name: str, found: Served, base_model_name: str | None = None) -> bool:
    """Let a name stand for what was found, once all engines have loaded it. Callers hold the name's lock.

    Returns:
        False where it stood for that version already.
    """
    from vllm.lora.request import LoRARequest

    before = models.lora_requests.get(name)
    if before is not None and before.lora_path == str(found.version):
        served_by(models)[name] = found
        return False
    lora = LoRARequest(lora_name=name, lora_int_id=NUMBERS.of(found.version.key), lora_path=str(found.version))
    if base_model_name is not None and models.is_base_model(base_model_name):
        lora.base_model_name = base_model_name
    await models.engine_client.add_lora(lora)
    models.lora_requests[name] = lora
    served_by(models)[name] = found
    logger.info("reft: %s is %s", name, found.version)
    if before is not None:
        await _retire(models, before)
    return True


async def follow(models: Any, name: str | None) -> Any:
    """Bring a name up to date before a request is answered under it, and resolve it from the store on first use.

    Returns:
        An error answer where the name stands for an adapter that cannot run, else None.
    """
    if not name or not hasattr(models, "lora_resolver_lock") or models.is_base_model(name):
        return None
    served = served_by(models).get(name)
    if served is not None:
        if served.moved:
            await _update(models, name, served)
        return None
    from reft_vllm.front_end.resolver import is_reference, resolving

    if name in models.lora_requests or not resolving() or not is_reference(name):
        return None
    answer = await models.resolve_lora(name)
    status = getattr(getattr(answer, "error", None), "code", None)
    return answer if status == HTTPStatus.BAD_REQUEST else None


async def _update(models: Any, name: str, served: Served) -> None:
    async with models.lora_resolver_lock[name]:
        if served_by(models).get(name) is not served:
            return
        served.checked = time.monotonic()
        try:
            found = await asyncio.to_thread(find, served.reference, models.model_config.model)
            if found is not None:
                found.follows = served.follows
                await stand_for(models, name, found, models.lora_requests[name].base_model_name)
        except Exception as error:
            logger.warning("reft: %s stays at %s: %s", name, served.version, error)


async def resolve_name(models: Any, original: Callable[..., Any], name: str) -> Any:
    """vLLM's resolvers; a name that ours resolved stands for what its reference stands for from then on."""
    from reft_vllm.front_end.resolver import FOUND

    try:
        answer = await original(models, name)
    except ReftError as error:
        return refuse(error)
    found = FOUND.pop(name, None)
    if found is not None and getattr(answer, "lora_path", None) == str(found.version):
        served_by(models)[name] = found
    return answer


async def _retire(models: Any, lora: Any) -> None:
    """Free a version in the workers that no name stands for; one that requests still run under goes by its last use."""
    if not is_adapter(lora.lora_path):
        return
    if any(other.lora_path == lora.lora_path for other in models.lora_requests.values()):
        return
    try:
        await models.engine_client.remove_lora(NUMBERS.of(Version.parse(lora.lora_path).key))
    except Exception as error:
        logger.warning("reft: %s stays loaded until it is the least recently used: %s", lora.lora_path, error)
