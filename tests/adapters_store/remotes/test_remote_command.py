from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_variants import vary
from click.testing import CliRunner, Result
from docker_registry import DockerRegistry
from programs import needs_program

from adapters_store import Store
from adapters_store.commands import store as group
from adapters_store.remotes.transfer import connect, pull
from reft_plugins.errors import ReftError, VersionConflictError

Invoke = Callable[..., Result]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(each) for each in arguments])


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def address(docker_registry: DockerRegistry, prefix: str) -> str:
    return docker_registry.address(prefix)


@needs_program("docker-registry")
def test_the_journey(store: Store, other_store: Store, address: str, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "team/topic:latest")
    sent = invoke("push", "sentiment:latest", address)
    assert sent.exit_code == 0, sent.output
    assert "sent sentiment@v1" in sent.stdout
    assert "(latest)" in sent.stdout
    assert "1 version, 1 new, " in sent.stdout
    again = invoke("push", "--all", address).stdout
    assert "already there: sentiment@v1" in again
    assert "sent team/topic@v1" in again
    table = [line.split() for line in invoke("ls", address).stdout.splitlines()]
    assert table[0] == ["NAME", "VERSION", "TAGS", "METHOD", "BASE", "SIZE", "DIGEST"]
    assert [row[:5] for row in table[1:]] == [
        ["sentiment", "v1", "latest", "loreft", "tiny-llama"],
        ["team/topic", "v1", "latest", "loreft", "tiny-llama"],
    ]
    there = ("--store", other_store.root)
    assert "fetched sentiment@v1" in invoke("pull", f"{address}/sentiment:latest", *there).stdout
    assert "fetched team/topic@v1" in invoke("pull", address, "team/topic", *there).stdout
    assert invoke("pull", address, "--all", *there).exit_code == 0
    assert [record.reference for record in other_store.list()] == ["sentiment@v1", "team/topic@v1"]
    copied = invoke("copy", address, f"{address}/backup", "sentiment:latest", "--as", "kept")
    assert "copied kept@v1" in copied.stdout
    assert [row["name"] for row in answer(invoke("ls", f"{address}/backup", "--json"))] == ["kept"]
    assert [row["name"] for row in answer(invoke("ls", f"{address}/sentiment", "--json"))] == ["sentiment"]
    assert answer(invoke("ls", other_store.root, "--tag", "nothing", "--json")) == []


@needs_program("docker-registry")
def test_json(store: Store, other_store: Store, address: str, adapters: list[Path]) -> None:
    record = store.add(adapters[0], "sentiment:latest")
    document = answer(invoke("push", "sentiment", address, "--json"))
    transfer = document["transfers"][0]
    version = transfer["versions"][0]
    assert document["errors"] == []
    assert (transfer["source"], transfer["target"]) == (str(store.root), address)
    assert transfer["bytes"] == version["bytes"] == record.size
    assert (version["reference"], version["digest"], version["new"]) == ("sentiment@v1", record.digest, True)
    assert version["tags"] == ["latest"]
    listed = answer(invoke("ls", address, "--json"))
    assert listed == [
        {
            "reference": "sentiment@v1",
            "name": "sentiment",
            "version": 1,
            "digest": record.digest,
            "tags": ["latest"],
            "method": "loreft",
            "base": "tiny-llama",
            "size": record.size,
        }
    ]
    fetched = answer(invoke("pull", f"{address}/sentiment", "--json", "--store", other_store.root))
    assert fetched["transfers"][0]["bytes"] == record.size


@needs_program("docker-registry")
def test_what_is_refused_is_told_and_the_rest_arrives(
    store: Store, other_store: Store, address: str, adapters: list[Path], tmp_path: Path
) -> None:
    for adapter in adapters[:2]:
        store.add(adapter, "sentiment")
    store.add(adapters[2], "topic:latest")
    invoke("push", "--all", address)
    other_store.add(vary(adapters[0], tmp_path / "mine", "mine"), "sentiment")
    there = ("--store", other_store.root)
    result = invoke("pull", address, "--all", "--json", *there)
    assert result.exit_code == 1
    assert isinstance(result.exception, VersionConflictError)
    assert "--as NAME" in str(result.exception)
    assert "--renumber" in str(result.exception)
    document = json.loads(result.stdout)
    assert [each["kind"] for each in document["errors"]] == ["VersionConflictError"]
    assert [record.reference for record in other_store.list()] == ["sentiment@v1", "sentiment@v2", "topic@v1"]
    assert invoke("pull", address, "sentiment", "--renumber", *there).exit_code == 0
    assert other_store.find("sentiment@v3").digest == store.find("sentiment@v1").digest
    assert invoke("pull", address, "sentiment@v1", "--as", "theirs", *there).exit_code == 0
    assert other_store.find("theirs@v1").digest == store.find("sentiment@v1").digest


@needs_program("docker-registry")
def test_what_is_not_there_keeps_nothing_else_from_moving(
    store: Store, other_store: Store, address: str, adapters: list[Path]
) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "topic:latest")
    sent = invoke("push", "sentiment:latest", "sentimen:latest", "topic:latest", address, "--json")
    assert sent.exit_code == 1
    assert isinstance(sent.exception, ReftError)
    document = json.loads(sent.stdout)
    assert [each["versions"][0]["reference"] for each in document["transfers"]] == ["sentiment@v1", "topic@v1"]
    assert [each["kind"] for each in document["errors"]] == ["UnknownReferenceError"]
    fetched = invoke("pull", address, "nothing:latest", "topic:latest", "--store", other_store.root)
    assert fetched.exit_code == 1
    assert "fetched topic@v1" in fetched.stdout
    assert f"`reft store ls {address}` tells what is there" in str(fetched.exception)
    assert [record.reference for record in other_store.list()] == ["topic@v1"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("push", "oci://registry.example/team", "a:x"), "REMOTE comes last"),
        (("push", "oci://registry.example/team"), "name versions, or say --all"),
        (("push", "a:x", "oci://registry.example/team", "--all"), "not both"),
        (("push", "a:x", "http://registry.example/team"), "--plain-http"),
        (("pull", "a:x"), "says no remote"),
        (("ls", "oci://registry.example/team", "--metric", "a>1"), "Pull them first"),
    ],
)
def test_wrong_use_says_what_is_right(store: Store, arguments: tuple[str, ...], reason: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert reason in result.stderr


def test_a_registry_that_is_not_there(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    for arguments in (
        ("push", "sentiment", "oci://127.0.0.1:1/team"),
        ("pull", "oci://127.0.0.1:1/team/sentiment:latest"),
        ("ls", "oci://127.0.0.1:1/team"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert isinstance(result.exception, ReftError)
        assert "Connection refused" in str(result.exception)
        assert "try again" in str(result.exception)


@pytest.mark.parametrize(("library", "address"), [("oras", "oci://host/team"), ("huggingface_hub", "hf://org/repo")])
def test_without_its_library_the_error_says_what_to_install(
    store: Store, monkeypatch: pytest.MonkeyPatch, library: str, address: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ReftError, match=rf"needs {library}, .* pip install 'reft-plugins\[store\]'"):
        connect(address)


@pytest.mark.parametrize(
    "arguments",
    [
        ("push", "oci://host/team"),
        ("push", "sentiment", "http://host/team"),
        ("push", "sentiment", "word"),
        ("push", "A:x", "oci://host/team"),
        ("push", "--all", "sentiment", "oci://host/team"),
        ("push", "a", "b", "oci://host/team", "--as", "c"),
        ("push", "a", "oci://host/team", "--as", "c:x"),
        ("pull", "oci://host"),
        ("pull", "oci://host/team/a:b:c"),
        ("pull", "oci://host/team", "--all", "--as", "c"),
        ("copy", "oci://host/team"),
        ("copy", "oci://host/team", "nowhere", "a"),
        ("ls", "oci://host/team", "--metric", "accuracy"),
    ],
)
def test_wrong_use_exits_with_2(store: Store, arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Usage: " in result.output


def test_progress_is_told_in_bytes(store: Store, other_store: Store, adapters: list[Path]) -> None:
    """Never backwards, never more than there is, and complete at the end."""
    for adapter in adapters:
        store.add(adapter, "sentiment")
    told: list[tuple[int, int]] = []
    pull(store, "sentiment", other_store, watch=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(done <= total for done, total in told)
    assert told[-1][0] == told[-1][1] == sum(record.size for record in store.list())


def test_stores_in_folders_are_remotes_too(store: Store, other_store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    assert invoke("push", "sentiment", other_store.root).exit_code == 0
    assert other_store.find("sentiment:latest").digest == store.find("sentiment:latest").digest
    found = connect(str(other_store.root))
    assert isinstance(found, Store)
    assert invoke("push", "sentiment", "/nowhere/at/all").exit_code == 1
