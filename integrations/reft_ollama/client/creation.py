"""Creating a model in a running Ollama from an exported file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_ollama.client.names import check_name
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from reft_ollama.client.connection import Connection, Progress
    from reft_ollama.templates.modelfile import Modelfile


def check_server(name: str, host: str | None = None) -> None:
    """Refuse what would fail after a long export: a name that is none, an Ollama that is not there or too old.

    Raises:
        ExportError: naming it.
    """
    check_name(name)
    with closing(_connect(host)) as server:
        server.check_version()


def create_model(
    name: str,
    gguf: Path,
    modelfile: Modelfile,
    *,
    host: str | None = None,
    quantize: str | None = None,
    progress: Progress = lambda step, done, total: None,
) -> list[str]:
    """Upload a GGUF file and create a model from it with the Modelfile's settings.

    Args:
        name: the model's name in Ollama, for example `sentiment:v1`.
        host: address of the server; by default what `OLLAMA_HOST` says, else this machine.
        quantize: number format to have Ollama convert the file to, for example `q4_K_M`; only some versions do.
        progress: called with bytes hashed and sent, and with every status the server reports.

    Returns:
        What a user has to know of the model, in sentences: what Ollama shows otherwise than it was sent, and what was
        not measured.

    Raises:
        ExportError: no server answers, or it refuses the file or the model; the exported files stay where they are.
    """
    from reft_ollama.client.shown import differences

    check_name(name)
    with closing(_connect(host)) as server:
        try:
            server.check_version()
            request = create_request(name, {gguf.name: server.ensure_blob(gguf, progress)}, modelfile, quantize)
            server.create_model(request, progress)
            notes = differences(request, server.shown(name))
        except ExportError as error:
            raise ExportError(f"{error}. The exported files are in {gguf.parent}") from None
    if quantize:
        notes.append(f"answers of Ollama's {quantize} were not measured, those of the exported file were")
    return notes


def create_request(
    name: str, files: dict[str, str], modelfile: Modelfile, quantize: str | None = None
) -> dict[str, Any]:
    """The fields of `/api/create` that say what a Modelfile says.

    Args:
        files: digest of every blob by file name, which must be relative.
    """
    request: dict[str, Any] = {
        "model": name,
        "files": files,
        "template": modelfile.template,
        "system": modelfile.system,
        "parameters": modelfile.parameters,
        "license": modelfile.licenses or None,
        "quantize": quantize,
    }
    return {field: value for field, value in request.items() if value is not None}


def _connect(host: str | None) -> Connection:
    try:
        from reft_ollama.client.connection import Connection
    except ImportError:
        raise ExportError("--create needs the Ollama client: pip install ollama (or reft-plugins[ollama])") from None
    return Connection(host)
