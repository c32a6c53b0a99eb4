from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from adapters_store import Store
from adapters_store.commands import store as group
from adapters_store.layout.oci import CERTIFICATE_TYPE
from adapters_store.lineage import lineage
from adapters_store.records import Record
from reft_plugins.errors import UnknownReferenceError

DATA, NOWHERE = "sha256:" + "1" * 64, "sha256:" + "0" * 64
Publish = Callable[..., Record]
Digest = Callable[[Record | str], str]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(group, [str(each) for each in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def family(store: Store, publish: Publish, digest_of: Digest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """`grandparent` → `parent` and `aunt` → `child`, with a certificate at `parent`."""
    monkeypatch.setenv("REFT_AUTHOR", "ada@lab")
    grandparent = publish("grandparent:latest", ("imported", "peft:files", NOWHERE), data=DATA)
    monkeypatch.setenv("REFT_AUTHOR", "grace@lab")
    parent = publish("parent:latest", ("composed", "grandparent:latest", digest_of(grandparent)))
    aunt = publish("aunt:latest", data=DATA)
    publish("child:latest", ("composed", "parent:latest", digest_of(parent)), ("composed", "aunt", digest_of(aunt)))
    _certify(store, "parent:latest", {"fidelity": {"top1_agreement": 0.98765}})
    return store


def _certify(store: Store, reference: str, more: dict[str, Any]) -> None:
    certificate = {"exported_to": "ollama", "kind": "approximated", "strategy": "merged", **more}
    files = {"certificate.json": ("application/json", json.dumps(certificate).encode())}
    store.attach(reference, CERTIFICATE_TYPE, files)


def test_the_tree(family: Store) -> None:
    lines = run("log", "child:latest").splitlines()
    drawn = [(len(line) - len(line.lstrip("│├└─ ")), line.lstrip("│├└─ ").split("  ")[0]) for line in lines]
    trained = "trained 40 steps on 20 examples, seed 3, accuracy 0.75; data " + DATA
    assert drawn == [
        (0, "child@v1"),
        (4, "composed parent@v1"),
        (8, "exported to ollama, approximated (merged), top-1 agreement 0.9877"),
        (8, "composed grandparent@v1"),
        (12, trained),
        (12, "imported peft:files"),
        (4, "composed aunt@v1 (called aunt)"),
        (8, trained),
    ]
    assert "by grace@lab" in lines[0] and "[child:latest]" in lines[0]
    assert any("grandparent@v1" in line and "by ada@lab" in line for line in lines)
    assert any("imported peft:files  files of another library  sha256:0000" in line for line in lines)


def test_the_other_direction_and_shared_data(family: Store) -> None:
    text = run("log", "grandparent:latest", "--children")
    below = text[text.index("made of grandparent@v1") :].splitlines()
    assert "composed parent@v1" in below[1] and "composed child@v1" in below[2]
    assert below[3] == "trained on the same data: aunt@v1" and len(below) == 4
    assert "nothing in this store was made of child@v1" in run("log", "child:latest", "--children")
    assert "same data" not in run("log", "grandparent:latest", "--no-same-data")


def test_json(family: Store) -> None:
    found = json.loads(run("log", "child:latest", "--json"))
    assert found == json.loads(json.dumps(lineage(family, "child:latest").to_dict()))
    by_source = {node["source"]: node for node in found["nodes"]}
    assert by_source["parent:latest"]["exports"][0]["top1_agreement"] == 0.98765
    assert by_source["parent:latest"]["by"] == "grace@lab" and by_source["grandparent:latest"]["by"] == "ada@lab"
    assert by_source["aunt"]["training"]["data_sha256"] == DATA
    assert [edge["relation"] for edge in found["edges"]] == ["composed"] * 3 + ["imported"]


@pytest.mark.parametrize("wrong", [{"fidelity": 3}, {"fidelity": {"top1_agreement": "high"}}])
def test_a_certificate_that_says_nonsense(family: Store, wrong: dict[str, Any]) -> None:
    _certify(family, "aunt:latest", wrong)
    assert "note: aunt@v1: a certificate attached to it cannot be read" in run("log", "aunt:latest")
    _certify(family, "aunt:latest", {"fidelity": None})
    assert [each.top1_agreement for each in lineage(family, "parent:latest").nodes[0].exports] == [0.98765]


def test_a_diamond_is_drawn_once(store: Store, publish: Publish, digest_of: Digest) -> None:
    top = digest_of(publish("top:latest"))
    sides = [digest_of(publish(f"side-{n}:latest", ("composed", "top", top))) for n in (1, 2)]
    publish("end:latest", *(("composed", "a side", side) for side in sides))
    lines = run("log", "end:latest").splitlines()
    assert sum("top@v1" in line for line in lines) == 2 and sum("shown elsewhere" in line for line in lines) == 1
    assert len(lines) == 5


def test_control_sequences_stay_out(store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_AUTHOR", "\x1b[31mmallory")
    publish("child:latest", ("\x1b]0;owned\x07", "[red]x[/red]", None))
    text = run("log", "child:latest", "--children") + run("history")
    assert "[red]x[/red]" in text and "owned" in text and "mallory" in text
    assert "\x1b" not in text and "\x07" not in text


def test_where_tags_pointed(store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("sentiment:prod")
    publish("sentiment:latest")
    publish("other:prod")
    monkeypatch.setenv("REFT_AUTHOR", "ada@lab")
    store.tag("sentiment@v2", "prod")
    store.untag("sentiment:prod")
    rows = [line.split() for line in run("history", "sentiment:prod").splitlines()]
    assert rows[0] == ["AT", "BY", "ACTION", "WHAT", "DIGEST"]
    assert [(row[2], " ".join(row[3:-1])) for row in rows[1:]] == [
        ("tag", "sentiment:prod -> sentiment@v1"),
        ("tag", "sentiment:prod -> sentiment@v2"),
        ("untag", "sentiment:prod"),
    ]
    assert [row[1] == "ada@lab" for row in rows[1:]] == [False, True, True]
    events = json.loads(run("history", "sentiment:prod", "--json"))
    assert [event["version"] for event in events] == [1, 2, None]
    actions = [event["action"] for event in json.loads(run("history", "sentiment", "--json"))]
    assert actions == ["version", "tag", "version", "tag", "tag", "untag"]
    assert len(json.loads(run("history", "--json"))) == len(actions) + 2


def test_wrong_use(store: Store, publish: Publish) -> None:
    publish("sentiment:prod")
    for arguments in (("log",), ("log", "NO:x"), ("history", "sentiment@v1"), ("history", "a", "b")):
        assert CliRunner().invoke(group, arguments).exit_code == 2
    for arguments in (("log", "sentiment:never"), ("history", "nobody"), ("history", "sentiment:never")):
        assert isinstance(CliRunner().invoke(group, arguments).exception, UnknownReferenceError)
