"""The client against a small server on this machine that records what it is sent and does wrong what it is told to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import as_adapter
from recording_server import Recorded, recording

from reft_ollama.client.creation import check_server, create_model
from reft_ollama.client.names import check_name
from reft_ollama.client.shown import differences, parse_parameters
from reft_ollama.export import export_ollama
from reft_ollama.templates.modelfile import Modelfile
from reft_plugins.errors import ExportError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site

CREATE_FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "from": (str,),
    "files": (dict,),
    "adapters": (dict,),
    "template": (str,),
    "license": (str, list),
    "system": (str,),
    "parameters": (dict,),
    "messages": (list,),
    "stream": (bool,),
    "quantize": (str,),
}
"""What Ollama's documentation of `POST /api/create` lists, with types."""

PARAMETERS: dict[str, tuple[type, ...]] = {
    "mirostat": (int,),
    "mirostat_eta": (int, float),
    "mirostat_tau": (int, float),
    "num_ctx": (int,),
    "num_keep": (int,),
    "repeat_last_n": (int,),
    "repeat_penalty": (int, float),
    "temperature": (int, float),
    "seed": (int,),
    "stop": (str, list),
    "num_predict": (int,),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
}
"""What Ollama's documentation lists as parameters of a Modelfile, or as options of a request, with types."""


@pytest.fixture
def server() -> Iterator[Recorded]:
    with recording() as recorded:
        yield recorded


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(2_500_000))
    return path


def modelfile(**more: Any) -> Modelfile:
    settings: dict[str, Any] = {
        "source": "model.gguf",
        "template": "{{ .Prompt }}",
        "parameters": {"temperature": 0, "repeat_penalty": 1.0, "top_p": 0.9, "stop": ["</s>", 'a "quoted"\tone']},
        "licenses": ["free"],
    }
    return Modelfile(**{**settings, **more})


def check_documented(request: dict[str, Any]) -> None:
    """Hold a request for a model to the documentation of the interface."""
    for name, value in request.items():
        assert name in CREATE_FIELDS and isinstance(value, CREATE_FIELDS[name]), name
    for name, digest in request["files"].items():
        assert not Path(name).is_absolute() and not set(name) & set("\\:")
        assert digest.startswith("sha256:") and len(digest) == 71
    for name, value in request["parameters"].items():
        assert name in PARAMETERS and isinstance(value, PARAMETERS[name]) and not isinstance(value, bool), name
        assert all(isinstance(item, str) for item in (value if isinstance(value, list) else []))
    assert all(isinstance(text, str) for text in request.get("license", []))


def test_every_request_field_by_field(server: Recorded, file: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    assert create_model("demo:v1", file, modelfile(), host=server.address, progress=lambda *s: seen.append(s)) == []
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert server.kinds == [
        "GET /api/version",
        "HEAD /api/blobs/",
        "POST /api/blobs/",
        "POST /api/create",
        "POST /api/show",
    ]
    assert [path for _, path, _ in server.requests[1:3]] == [f"/api/blobs/{digest}"] * 2
    (blob,) = server.sent("POST", "/api/blobs/")
    assert blob == file.read_bytes()
    (body,) = server.sent("POST", "/api/create")
    check_documented(json.loads(body))
    assert json.loads(body) == {
        "model": "demo:v1",
        "stream": True,
        "files": {"model.gguf": digest},
        "template": "{{ .Prompt }}",
        "parameters": {"temperature": 0, "repeat_penalty": 1.0, "top_p": 0.9, "stop": ["</s>", 'a "quoted"\tone']},
        "license": ["free"],
    }
    assert json.loads(server.sent("POST", "/api/show")[0]) == {"model": "demo:v1"}
    size = file.stat().st_size
    for step in ("Hashing model.gguf", "Uploading model.gguf"):
        assert [(done, total) for s, done, total in seen if s == step] == [(n, size) for n in (1 << 20, 2 << 20, size)]
    assert [step for step, _, _ in seen[-4:]] == list(server.statuses)


def test_nothing_is_uploaded_twice(server: Recorded, file: Path) -> None:
    for name in ("one", "two"):
        create_model(name, file, modelfile(), host=server.address)
    assert len(server.sent("POST", "/api/blobs/")) == 1 and len(server.sent("HEAD", "/api/blobs/")) == 2
    assert set(server.models) == {"one", "two"}


def test_what_is_not_there_is_not_sent(server: Recorded, file: Path) -> None:
    create_model("demo", file, modelfile(licenses=[]), host=server.address)
    (body,) = server.sent("POST", "/api/create")
    assert not {"license", "quantize", "system", "adapters", "from"} & set(json.loads(body))


def test_system_message_and_several_licenses(server: Recorded, file: Path) -> None:
    given = modelfile(system="Be brief.", licenses=["of the base", "of the adapter"])
    assert create_model("demo", file, given, host=server.address) == []
    request = json.loads(server.sent("POST", "/api/create")[0])
    check_documented(request)
    assert request["system"] == "Be brief." and request["license"] == ["of the base", "of the adapter"]
    server.shows = {"system": ""}
    (note,) = create_model("demo", file, given, host=server.address)
    assert "another system than was sent" in note


def test_quantisation_is_asked_for_and_looked_at(server: Recorded, file: Path) -> None:
    (unmeasured,) = create_model("demo", file, modelfile(), host=server.address, quantize="q4_K_M")
    assert "q4_K_M were not measured" in unmeasured
    assert json.loads(server.sent("POST", "/api/create")[0])["quantize"] == "q4_K_M"
    server.shows = {"details": {"quantization_level": "F16"}}
    (note, _) = create_model("demo", file, modelfile(), host=server.address, quantize="q4_K_M")
    assert "F16" in note and "q4_K_M" in note


def test_servers_that_quantise_no_gguf_files_are_explained(server: Recorded, file: Path) -> None:
    reason = "create-time quantization is only supported for safetensors imports"
    server.answers["POST /api/create"] = (400, json.dumps({"error": reason}).encode())
    with pytest.raises(ExportError, match=rf"{reason}.*--ollama-quantize.*--dtype"):
        create_model("demo", file, modelfile(), host=server.address, quantize="q4_K_M")


@pytest.mark.parametrize(
    ("shows", "part"),
    [
        ({"template": "{{ .Response }}"}, r"another template than was sent: '\{\{ \.Response \}\}'"),
        ({"parameters": 'temperature 0\nrepeat_penalty 1\ntop_p 0.9\nstop "</s>"'}, "the parameter stop"),
        ({"parameters": ""}, "the parameter temperature"),
    ],
)
def test_what_ollama_made_otherwise_is_told(shows: dict[str, Any], part: str, server: Recorded, file: Path) -> None:
    import re

    server.shows = shows
    notes = create_model("demo", file, modelfile(), host=server.address)
    assert any(re.search(part, note) for note in notes), notes


def test_numbers_and_texts_are_compared_however_they_are_written() -> None:
    text = 'temperature 0.7\nnum_ctx    4096\nstop   "<|end|>"\nstop "two words"\nrepeat_penalty 1e+00\nodd "a\\x01b"'
    assert parse_parameters(text) == {
        "temperature": [0.7],
        "num_ctx": [4096.0],
        "stop": ["<|end|>", "two words"],
        "repeat_penalty": [1.0],
        "odd": ["a\\x01b"],
    }
    request = {
        "model": "m",
        "system": "Be brief.",
        "parameters": {"num_ctx": 4096, "repeat_penalty": 1.0, "stop": ["two words", "<|end|>"]},
    }
    assert differences(request, {"parameters": text, "system": "Be brief."}) == []
    assert len(differences(request, {"parameters": text})) == 1


def test_no_server(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    for call in (lambda: check_server("demo"), lambda: create_model("demo", file, modelfile())):
        with pytest.raises(ExportError, match=r"no Ollama server answers at 127\.0\.0\.1:9.*ollama serve.*OLLAMA_HOST"):
            call()


def test_errors_say_where_the_files_are(server: Recorded, file: Path) -> None:
    server.answers["POST /api/create"] = (500, b'{"error": "no space left on device"}')
    with pytest.raises(ExportError) as refusal:
        create_model("demo", file, modelfile(), host=server.address)
    assert "no space left on device" in str(refusal.value) and str(file.parent) in str(refusal.value)


@pytest.mark.parametrize("version", ["0.5.4", "0.1.32", "v0.4.0-rc1"])
def test_too_old_a_server(version: str, server: Recorded, file: Path) -> None:
    server.version = version
    with pytest.raises(ExportError, match=rf"version {version}.*0\.5\.5.*ollama create"):
        create_model("demo", file, modelfile(), host=server.address)
    assert server.kinds == ["GET /api/version"], "nothing is uploaded to it"


@pytest.mark.parametrize("version", ["0.5.5", "0.12.11", "1.0.0", "0.0.0", "0.14.0-rc2", "custom"])
def test_versions_that_will_do(version: str, server: Recorded, file: Path) -> None:
    server.version = version
    create_model("demo", file, modelfile(), host=server.address)
    assert "demo" in server.models


def test_a_file_that_changes_on_the_way_is_rejected_by_its_digest(server: Recorded, file: Path) -> None:
    def change(step: str, done: int, total: int) -> None:
        if step.startswith("Hashing") and done == total:
            data = bytearray(file.read_bytes())
            data[1_000_000] ^= 1
            file.write_bytes(data)

    with pytest.raises(ExportError, match=r"refuses to take model\.gguf.*digest mismatch, expected \"sha256:"):
        create_model("demo", file, modelfile(), host=server.address, progress=change)
    assert not server.models and not server.blobs


def test_a_connection_that_breaks_off_in_an_upload(server: Recorded, file: Path) -> None:
    file.write_bytes(os.urandom(20_000_000))
    server.cut_at = 3_000_000
    with pytest.raises(ExportError, match=r"broke off.*take model\.gguf \(20,000,000 bytes\).*disk full.*try again"):
        create_model("demo", file, modelfile(), host=server.address)
    assert not server.models


@pytest.mark.parametrize("kind", ["GET /api/version", "POST /api/create", "POST /api/show"])
def test_a_connection_that_breaks_off_in_an_answer(kind: str, server: Recorded, file: Path) -> None:
    server.breaks_off, server.statuses = kind, ("parsing GGUF",)
    if kind == "POST /api/show":
        server.statuses = ("success",)
    with pytest.raises(ExportError, match=r"broke off the connection when it was to .*try again"):
        create_model("demo", file, modelfile(), host=server.address)


def test_an_end_without_success(server: Recorded, file: Path) -> None:
    server.statuses = ("parsing GGUF", "writing manifest")
    with pytest.raises(ExportError, match="stopped before the model 'demo' was there.*'writing manifest'"):
        create_model("demo", file, modelfile(), host=server.address)


def test_an_error_in_the_middle_of_the_statuses(server: Recorded, file: Path) -> None:
    lines = b'{"status": "parsing GGUF"}\n{"error": "unsupported architecture \\"llamma\\""}\n'
    server.answers["POST /api/create"] = (200, lines)
    with pytest.raises(ExportError, match="refuses to create the model 'demo': unsupported architecture \"llamma\""):
        create_model("demo", file, modelfile(), host=server.address)


@pytest.mark.parametrize("status", [404, 405])
@pytest.mark.parametrize("kind", ["GET /api/version", "POST /api/blobs/", "POST /api/create"])
def test_servers_without_these_places(status: int, kind: str, server: Recorded, file: Path) -> None:
    server.answers[kind] = (status, b"404 page not found")
    with pytest.raises(ExportError, match=rf"has no place to .*{status}.*no Ollama.*OLLAMA_HOST"):
        create_model("demo", file, modelfile(), host=server.address)


HTML = b"<!doctype html><title>Sign in</title>"


@pytest.mark.parametrize("answer", [HTML, b"[]", b'"fine"', b"null", b"\xff\xfe"])
@pytest.mark.parametrize("kind", ["GET /api/version", "POST /api/create", "POST /api/show"])
def test_answers_that_are_not_of_the_interface(kind: str, answer: bytes, server: Recorded, file: Path) -> None:
    server.answers[kind] = (200, answer)
    with pytest.raises(ExportError, match=r"no Ollama server, or one behind a proxy.*OLLAMA_HOST"):
        create_model("demo", file, modelfile(), host=server.address)


def test_refusals_that_are_no_json_are_quoted(server: Recorded, file: Path) -> None:
    server.answers["POST /api/blobs/"] = (413, b"Request Entity Too Large")
    with pytest.raises(ExportError, match=r"refuses to take model\.gguf.*: Request Entity Too Large"):
        create_model("demo", file, modelfile(), host=server.address)


def test_the_server_refuses_the_model(server: Recorded, file: Path) -> None:
    server.answers["POST /api/create"] = (400, b'{"error": "invalid model name"}')
    with pytest.raises(ExportError, match="refuses to create the model 'demo': invalid model name"):
        create_model("demo", file, modelfile(), host=server.address)


@pytest.mark.parametrize(
    "name", ["", "a b", "x:y:z", "-x", "a/b/c/d", "name:", "n" * 81, "na.me/model", "übung", "a//b"]
)
def test_names_that_are_none(name: str, server: Recorded, file: Path) -> None:
    for call in (lambda: check_server(name, server.address), lambda: create_model(name, file, modelfile())):
        with pytest.raises(ExportError, match=r"is no name for an Ollama model.*model:tag"):
            call()
    assert not server.requests


@pytest.mark.parametrize("name", ["demo", "demo:v1.2-rc_3", "me/demo:latest", "localhost:5000/me/demo", "_x", "n" * 80])
def test_names_that_are_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("host", ["http://127.0.0.1:port", "http://[::1", "ht tp://x", "127.0.0.1:999999"])
def test_addresses_that_are_none(host: str) -> None:
    with pytest.raises(ExportError, match=r"is no address of a server.*OLLAMA_HOST as host:port"):
        check_server("demo", host)


def constant(base: Path) -> Any:
    shift = torch.randn(128, generator=torch.Generator().manual_seed(4))
    return as_adapter(base, Edit(Site(1), Positions.parse("all"), shift=shift))


def test_an_export_sends_the_file_it_wrote(server: Recorded, tiny_llama: Path, tmp_path: Path) -> None:
    result = export_ollama(constant(tiny_llama), tiny_llama, tmp_path, create="constant", host=server.address)
    (blob,) = server.sent("POST", "/api/blobs/")
    assert blob == result.gguf.read_bytes()
    request = json.loads(server.sent("POST", "/api/create")[0])
    check_documented(request)
    assert request["model"] == "constant" and request["template"] == "{{ .Prompt }}"
    assert "temperature" in request["parameters"]
    assert not any("Ollama" in warning for warning in result.warnings)


def test_what_ollama_shows_otherwise_is_in_the_result(server: Recorded, tiny_llama: Path, tmp_path: Path) -> None:
    server.shows = {"template": "{{ .System }}"}
    result = export_ollama(constant(tiny_llama), tiny_llama, tmp_path, create="constant", host=server.address)
    assert any("another template" in warning for warning in result.warnings)


def test_an_export_asks_for_the_server_before_it_begins(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no Ollama server answers"):
        export_ollama(constant(tiny_llama), tiny_llama, tmp_path / "out", create="constant", host="127.0.0.1:9")
    with pytest.raises(ExportError, match="no name for an Ollama model"):
        export_ollama(constant(tiny_llama), tiny_llama, tmp_path / "out", create="con stant", host="127.0.0.1:9")
    assert not (tmp_path / "out").exists()
