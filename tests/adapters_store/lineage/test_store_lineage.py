from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_variants import flip_bit

from adapters_store import Store
from adapters_store.layout.blobs import Blobs
from adapters_store.lineage import Lineage, catalog, lineage, tracing
from adapters_store.records import Record
from reft_plugins.adapter import Adapter
from reft_plugins.compose import compose
from reft_plugins.errors import StoreError, UnknownReferenceError

DATA, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
NOWHERE = "sha256:" + "0" * 64
Publish = Callable[..., Record]
Digest = Callable[[Record | str], str]


def relations(found: Lineage) -> set[tuple[str, str, str]]:
    """Child, relation and parent, by their references."""
    names = {node.key: ", ".join(node.references) or str(node.source) for node in found.nodes}
    return {(names[edge.child], edge.relation, names[edge.parent]) for edge in found.edges}


def test_a_composition_knows_its_parents(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    """The digests that `compose` writes are those by which the store finds versions."""
    store.add(adapters[0], "german:latest")
    store.add(adapters[1], "team/polite:latest")
    store.add(adapters[2], "unrelated:latest")
    both = compose(["german:latest", adapters[1]])
    store.add(both.save(tmp_path / "both"), "both:latest")
    half = compose(["both:latest"], [0.5])
    store.add(half.save(tmp_path / "half"), "half:latest")
    store.tag("german:latest", "prod")
    found = lineage(store, "half:latest")
    assert found.reference == "half@v1" and found.root == half.digest
    assert [node.key for node in found.nodes[:2]] == [half.digest, both.digest]
    assert relations(found) == {
        ("half@v1", "composed", "both@v1"),
        ("both@v1", "composed", "german@v1"),
        ("both@v1", "composed", "team/polite@v1"),
    }
    german = found.node(Adapter.load(adapters[0]).digest)
    assert german.tags == ("german:latest", "german:prod") and german.source == "german:latest"
    assert (german.kind, german.method, german.base) == ("version", "loreft", "tiny-llama")
    assert german.created is not None and found.same_data == () and not found.problems and not found.truncated
    assert [edge.parent for edge in found.parents(both.digest)] == [
        Adapter.load(adapters[0]).digest,
        Adapter.load(adapters[1]).digest,
    ]


def test_parents_are_found_under_any_name(store: Store, publish: Publish, digest_of: Digest) -> None:
    first = publish("old-name:latest")
    store.add(store.checkout("old-name:latest"), "new-name:best")
    publish("child:latest", ("composed", "a folder", digest_of(first)))
    store.remove("old-name@v1", force=True)
    parent = lineage(store, "child:latest").nodes[1]
    assert (parent.kind, parent.references, parent.tags) == ("version", ("new-name@v1",), ("new-name:best",))
    store.remove("new-name@v1", force=True)
    gone = lineage(store, "child:latest").nodes[1]
    assert (gone.kind, gone.references, gone.source) == ("missing", (), "a folder")


def test_what_the_store_does_not_have(store: Store, publish: Publish) -> None:
    publish(
        "child:latest", ("imported", "peft:files", NOWHERE), ("composed", "lost:v1", OTHER), ("rotation", "x", None)
    )
    found = lineage(store, "child:latest")
    assert [(node.key, node.kind) for node in found.nodes[1:]] == [
        (NOWHERE, "outside"),
        (OTHER, "missing"),
        ("x", "missing"),
    ]
    assert [edge.relation for edge in found.edges] == ["imported", "composed", "rotation"]


def test_a_manifest_in_another_hand(store: Store, publish: Publish, digest_of: Digest) -> None:
    """The store keeps bytes as they are; the digest is of how this project writes the same manifest."""
    by_hand = publish("by-hand:latest", indent=0)
    digest = digest_of(by_hand)
    assert store.show("by-hand:latest").image_manifest["config"]["digest"] != digest
    publish("child:latest", ("composed", "by-hand:latest", digest))
    publish("other:latest", ("composed", "a folder", digest))
    assert lineage(store, "child:latest").node(digest).references == ("by-hand@v1",)
    assert lineage(store, "other:latest").node(digest).kind == "missing", "nothing says where to look"
    children = lineage(store, "by-hand:latest", children=True).children(digest)
    assert {edge.source for edge in children} == {"by-hand:latest", "a folder"}


def test_parents_named_by_version_or_by_their_image(store: Store, publish: Publish) -> None:
    first = publish("a:latest")
    publish("a:latest")
    publish("child:latest", ("tuned", "a@v2", None), ("tuned", "a:latest", None), ("tuned", "its image", first.digest))
    found = lineage(store, "child:latest")
    assert [node.references for node in found.nodes[1:]] == [("a@v2",), (), ("a@v1",)], "tags move, so they say nothing"


def test_children_and_no_strangers(store: Store, publish: Publish, digest_of: Digest) -> None:
    root = digest_of(publish("root:latest"))
    left = digest_of(publish("left:latest", ("composed", "root", root)))
    right = digest_of(publish("right:latest", ("composed", "root", root)))
    publish("bottom:latest", ("composed", "left", left), ("composed", "right", right), ("composed", "root", root))
    publish("stranger:latest", ("composed", "elsewhere", OTHER))
    publish("same-data:latest", data=root)
    assert {node.references for node in lineage(store, "root:latest").nodes} == {("root@v1",)}
    found = lineage(store, "root:latest", children=True)
    assert relations(found) == {
        ("left@v1", "composed", "root@v1"),
        ("right@v1", "composed", "root@v1"),
        ("bottom@v1", "composed", "left@v1"),
        ("bottom@v1", "composed", "right@v1"),
        ("bottom@v1", "composed", "root@v1"),
    }
    assert len(found.nodes) == 4
    middle = lineage(store, "left:latest", children=True)
    assert relations(middle) == {("left@v1", "composed", "root@v1"), ("bottom@v1", "composed", "left@v1")}


def test_others_of_the_same_data(store: Store, publish: Publish) -> None:
    publish("first:latest", data=DATA)
    publish("second:latest", data=DATA)
    publish("other:latest", data=OTHER)
    publish("untrained:latest", ("composed", "by chance", DATA))
    publish("other-too:latest", ("composed", "by chance", DATA), data=OTHER)
    found = lineage(store, "first:latest")
    assert found.same_data == ("second@v1",)
    training = found.nodes[0].training
    assert training is not None and (training.data_sha256, training.steps, training.seed) == (DATA, 40, 3)
    assert dict(training.metrics) == {"accuracy": 0.75}
    assert lineage(store, "other:latest").same_data == ("other-too@v1",)
    assert lineage(store, "untrained:latest").nodes[0].training is None
    assert lineage(store, "first:latest", same_data=False).same_data is None


def test_a_crowd_of_the_same_data_is_cut(store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MAX_NODES", 3)
    for _ in range(6):
        publish("crowd", data=DATA)
    found = lineage(store, "crowd@v1")
    assert found.truncated and found.same_data is not None and 1 < len(found.same_data) < 5


def test_circles_end(store: Store, publish: Publish) -> None:
    publish("a", ("tuned", "b@v1", None))
    publish("b", ("tuned", "a@v1", None), ("tuned", "b@v1", None))
    found = lineage(store, "a@v1", children=True)
    assert relations(found) == {("a@v1", "tuned", "b@v1"), ("b@v1", "tuned", "a@v1"), ("b@v1", "tuned", "b@v1")}


def test_large_graphs_are_cut(
    store: Store, publish: Publish, digest_of: Digest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MAX_NODES", 4)
    last = publish("chain")
    first = digest_of(last)
    for _ in range(6):
        last = publish("chain", ("composed", "chain", digest_of(last)))
    found = lineage(store, last.reference)
    assert found.truncated and [node.references for node in found.nodes] == [(f"chain@v{n}",) for n in (7, 6, 5, 4)]
    assert all({edge.child, edge.parent} <= {node.key for node in found.nodes} for edge in found.edges)
    down = lineage(store, "chain@v1", children=True)
    assert down.root == first and down.truncated and len(down.nodes) == 4


def test_damage_elsewhere_is_told(
    store: Store, publish: Publish, digest_of: Digest, blob: Callable[[str, str], Path]
) -> None:
    parent = publish("parent:latest", data=DATA)
    publish("child:latest", ("composed", "parent:latest", digest_of(parent)), data=DATA)
    flip_bit(blob("parent:latest", "config"), 40)
    found = lineage(store, "child:latest")
    assert found.nodes[1].kind == "missing"
    assert found.problems and all("parent@v1" in problem for problem in found.problems)
    flip_bit(blob("child:latest", "config"), 40)
    with pytest.raises(StoreError, match="damaged"):
        lineage(store, "child:latest")
    with pytest.raises(UnknownReferenceError):
        lineage(store, "child:never")


def test_reads_only_what_it_needs(
    store: Store, publish: Publish, digest_of: Digest, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = publish("parent:latest")
    for number in range(30):
        publish(f"other-{number}", data=DATA)
    publish("child:latest", ("composed", "parent:latest", digest_of(parent)), data=DATA)
    reads: list[str] = []
    read = Blobs.read
    monkeypatch.setattr(Blobs, "read", lambda self, what, limit: reads.append(what.digest) or read(self, what, limit))
    catalog._mentions.cache_clear()
    lineage(store, "child:latest", same_data=False)
    assert 0 < len(reads) < 10
    counted = len(reads)
    first = lineage(store, "child:latest")
    everything = len(reads) - counted
    assert everything > 60 and len(first.same_data or ()) == 30
    counted = len(reads)
    lineage(store, "parent:latest", children=True)
    assert len(reads) - counted < 10, "what was read once is remembered"


def test_no_torch(store: Store, publish: Publish, digest_of: Digest) -> None:
    parent = publish("parent:latest", data=DATA)
    publish("child:latest", ("composed", "parent:latest", digest_of(parent)), data=DATA)
    program = f"""
import sys
from adapters_store import Store
from adapters_store.lineage import lineage
from adapters_store.commands import store
found = lineage(Store.open({str(store.root)!r}), "child:latest", children=True)
assert len(found.nodes) == 2 and found.same_data == ("parent@v1",), found
for arguments in (["log", "child:latest"], ["history"]):
    store.main([*arguments, "--store", {str(store.root)!r}], standalone_mode=False)
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_thousands_of_parents_take_no_minutes(store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile manifest names as many as its size allows; what there is no room for is not looked up."""
    for _ in range(20):
        publish("crowd")
    publish("child", *(("composed", "crowd:x", f"sha256:{number:064x}") for number in range(10_000)))
    asked: list[str | None] = []
    find = catalog.Catalog.find
    monkeypatch.setattr(
        catalog.Catalog, "find", lambda self, digest, source: asked.append(digest) or find(self, digest, source)
    )
    found = lineage(store, "child@v1")
    assert found.truncated and len(found.nodes) == tracing.MAX_NODES == len(asked) + 1
