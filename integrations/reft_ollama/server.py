"""Sending an exported model to a running Ollama."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reft_ollama.templates.modelfile import Modelfile
from reft_plugins.errors import ExportError


def create_model(
    name: str,
    gguf: Path,
    modelfile: Modelfile,
    *,
    host: str | None = None,
    progress: Callable[[str], None] = lambda status: None,
) -> None:
    """Upload a GGUF file and create a model from it with the Modelfile's settings.

    Args:
        name: the model's name in Ollama, for example `sentiment:v1`.
        host: address of the server; by default what `OLLAMA_HOST` says, else this machine.
        progress: called with every status the server reports.

    Raises:
        ExportError: no server answers, or it refuses the model; the exported files stay where they are.
    """
    try:
        import httpx
        import ollama
    except ImportError:
        raise ExportError("--create needs the Ollama client: pip install ollama (or reft-plugins[ollama])") from None
    where = host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
    client = ollama.Client(host=host)
    request: dict[str, Any] = {
        "template": modelfile.template,
        "parameters": modelfile.parameters,
        "license": modelfile.license,
    }
    try:
        progress(f"uploading {gguf.name}")
        digest = client.create_blob(gguf)
        for update in client.create(model=name, files={gguf.name: digest}, stream=True, **request):
            progress(update.status or "")
    except ollama.ResponseError as error:
        raise ExportError(f"Ollama at {where} refuses the model {name!r}: {error.error}") from None
    except (ConnectionError, httpx.HTTPError) as error:
        raise ExportError(
            f"no Ollama server answers at {where} ({type(error).__name__}). Start one with `ollama serve`, or set "
            f"OLLAMA_HOST to its address; the exported files are in {gguf.parent}, so that "
            f"`ollama create {name} -f Modelfile` there does the rest"
        ) from None
