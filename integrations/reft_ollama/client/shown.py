"""Whether a model that Ollama made has what was sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_LONGEST = 200


def differences(request: Mapping[str, Any], shown: Mapping[str, Any]) -> list[str]:
    """Sentences about what `/api/show` tells of a model and `/api/create` was not told.

    Args:
        request: what was sent to `/api/create`; shown: what `/api/show` answers.
    """
    found = []
    for field in ("template", "system"):
        if field in request and shown.get(field, "") != request[field]:
            found.append(
                f"Ollama shows another {field} than was sent: {_short(shown.get(field, ''))}; a chat with the model "
                "may not read as the Modelfile says"
            )
    sent, own = _flat(request.get("parameters", {})), parse_parameters(shown.get("parameters") or "")
    for name, values in sent.items():
        if sorted(map(str, own.get(name, []))) != sorted(map(str, values)):
            found.append(
                f"Ollama shows {_short(own.get(name, []))} for the parameter {name}, to which {values} was sent"
            )
    level, quantize = (shown.get("details") or {}).get("quantization_level"), request.get("quantize")
    if quantize and str(level).lower() != quantize.lower():
        found.append(f"the model's number format is {level}, although {quantize} was asked for")
    return found


def parse_parameters(text: str) -> dict[str, list[Any]]:
    """The parameters of a model as `/api/show` writes them: a name and a value per line, texts quoted."""
    found: dict[str, list[Any]] = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name:
            found.setdefault(name, []).append(_normal(_unquoted(value.strip())))
    return found


def _flat(parameters: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [_normal(item) for item in (value if isinstance(value, list) else [value])]
        for name, value in parameters.items()
    }


def _normal(value: Any) -> Any:
    """Numbers alike, however they are written."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _unquoted(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value.removeprefix('"').removesuffix('"')


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
