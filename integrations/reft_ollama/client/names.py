"""What Ollama accepts as the name of a model."""

from __future__ import annotations

import re

from reft_plugins.errors import ExportError

_MODEL = re.compile(
    r"(?:(?:(?P<host>\w[\w.:-]{0,349})/)?(?P<namespace>\w[\w-]{0,79})/)?"
    r"(?P<model>\w[\w.-]{0,79})(?::(?P<tag>\w[\w.-]{0,79}))?",
    re.ASCII,
)


def check_name(name: str) -> None:
    """Refuse what no Ollama takes as a model's name, before anything is sent.

    Raises:
        ExportError: saying what a name is.
    """
    if not _MODEL.fullmatch(name):
        raise ExportError(
            f"{name!r} is no name for an Ollama model. Write model:tag or namespace/model:tag; each part begins with a "
            "letter, a digit or '_' and has at most 80 letters, digits, '_', '-' and '.' (no '.' in a namespace)"
        )
