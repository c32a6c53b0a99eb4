from __future__ import annotations

from pathlib import Path

import pytest

from adapters_store import Store
from adapters_store.references import Reference
from adapters_store.remotes.address import Address, hub_name, is_loopback, locate
from reft_plugins.errors import StoreError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci://registry.example.com/team/nlp", Address("oci", "team/nlp", "registry.example.com")),
        ("oci://registry.example.com", Address("oci", "", "registry.example.com")),
        ("oci://registry.example.com/", Address("oci", "", "registry.example.com")),
        ("registry.example.com/team", Address("oci", "team", "registry.example.com")),
        ("oci://localhost:5000/a__b/c--d", Address("oci", "a__b/c--d", "localhost:5000")),
        ("localhost/x", Address("oci", "x", "localhost")),
        ("host:5000/x", Address("oci", "x", "host:5000")),
        ("oci://Host:5000/x", Address("oci", "x", "host:5000")),
        ("oci://[::1]:5000/x", Address("oci", "x", "[::1]:5000")),
        ("hf://Org/My-Repo.v2", Address("hf", "Org/My-Repo.v2")),
        ("./other", Address("store", "./other")),
        ("/data/store", Address("store", "/data/store")),
        ("..", Address("store", "..")),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    found = Address.parse(text)
    assert found == expected
    assert Address.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "word",
        "two words",
        "http://registry.example.com/team",
        "file:///etc",
        "oci://",
        "oci:///team",
        "oci://host//team",
        "oci://host/../etc",
        "oci://host/Team",
        "oci://host/team?x=1",
        "oci://host/team#x",
        "oci://user:password@host/team",
        "oci://host:0/team",
        "oci://host:65536/team",
        "oci://host:port/team",
        "oci://-host/team",
        "oci://host..example/team",
        "oci://host/te\nam",
        "oci://ho\x1bst/team",
        "oci://" + "x/" * 1000,
        "hf://repo",
        "hf://org/repo/more",
        "hf://org/../repo",
        "hf://org/re po",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(StoreError, match=r"Write oci://HOST"):
        Address.parse(text)


def test_a_folder_that_could_be_a_registry_has_to_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "my.store"):
        Store.init(tmp_path / name)
    assert Address.parse("plain") == Address("store", "plain")
    assert Address.parse("./my.store").scheme == "store"
    assert Address.parse("other.store/x").scheme == "oci"
    with pytest.raises(StoreError, match="could be a registry"):
        Address.parse("my.store")


@pytest.mark.parametrize(
    ("text", "address", "reference"),
    [
        ("oci://host:5000/team/nlp/sentiment:prod", "oci://host:5000/team/nlp", "sentiment:prod"),
        ("host.example/sentiment@v3", "oci://host.example", "sentiment@v3"),
        ("oci://host/a/b", "oci://host/a", "b"),
        ("oci://host/a/b@sha256:" + "0" * 64, "oci://host/a", "b@sha256:" + "0" * 64),
        ("hf://Org/My_Repo:prod", "hf://Org/My_Repo", "my_repo:prod"),
        ("hf://org/repo", "hf://org/repo", "repo"),
    ],
)
def test_addresses_that_end_in_a_reference(text: str, address: str, reference: str) -> None:
    assert locate(text) == (Address.parse(address), Reference.parse(reference))


@pytest.mark.parametrize(
    "text", ["oci://host:5000", "./store", "oci://host/a:b:c", "oci://host/a@v0", "oci://host/A:x"]
)
def test_what_ends_in_no_reference(text: str) -> None:
    with pytest.raises(StoreError):
        locate(text)


@pytest.mark.parametrize(
    ("repository", "name"),
    [("org/Repo", "repo"), ("org/a__B", "a_b"), ("org/a.-b", "a.b"), ("org/a-", "a"), ("org/Llama-3.1", "llama-3.1")],
)
def test_names_of_repositories_of_the_hub_are_names_of_a_store(repository: str, name: str) -> None:
    assert hub_name(repository) == name
    assert Reference.parse(name).name == name


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("127.evil.example", False),
        ("localhost.evil.example", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_only_this_machine_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
