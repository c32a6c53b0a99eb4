"""Connections cut at random bytes, and answers with random bytes changed: many of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
from cutting_proxy import CuttingProxy
from programs import needs_program

from adapters_store import Store
from adapters_store.layout.oci import MANIFEST_TYPE, SIGNATURE_TYPE, Descriptor
from adapters_store.remotes.address import Address
from adapters_store.remotes.folder import Folder
from adapters_store.remotes.registry import Registry
from adapters_store.remotes.remote import Progress, UnreachableError
from adapters_store.remotes.session import Patience
from adapters_store.remotes.transfer import pull, push
from reft_plugins.errors import ReftError
from reft_plugins.manifest import sha256

SHORT, LONG = 2, 40
HASTE = Patience(connect=5, silence=20, answer=30, retry_delay=0.01)
ATTEMPTS = 12


@pytest.fixture
def filled(store: Store, large_adapter: Path, adapters: list[Path]) -> Store:
    store.add(large_adapter, "name:large")
    store.add(adapters[0], "name:small")
    store.attach("name@v1", SIGNATURE_TYPE, {"signature.json": ("application/json", b"{}")})
    return store


def until_it_works(
    proxy: CuttingProxy, chance: random.Random, move: Callable[[], object], check: Callable[[], None]
) -> int:
    """Cut at random, in the end no more; returns how many attempts failed, after each of which `check` holds."""
    for attempt in range(ATTEMPTS):
        limit = int(10 ** chance.uniform(2, 6.3))
        sent = chance.random() < 0.5
        proxy.cut(limit if sent else None, None if sent else limit, times=10**6 if attempt < ATTEMPTS - 4 else 0)
        try:
            move()
            return attempt
        except UnreachableError:
            check()
    raise AssertionError("never works")


def cut_at_random(rounds: int, filled: Store, proxy: CuttingProxy, prefix: str, tmp_path: Path) -> None:
    expected = [(each.reference, each.digest, each.tags) for each in filled.list()]
    failures = 0
    for number in range(rounds):
        chance = random.Random(number)
        address = Address("oci", f"{prefix}/{number}", f"127.0.0.1:{proxy.port}")
        target = Store.init(tmp_path / f"target-{number}")

        def remote(address: Address = address, chunk: int = chance.choice((1 << 20, 1 << 30))) -> Registry:
            return Registry(address, patience=HASTE, chunk=chunk)

        def fetch(target: Store = target) -> None:
            pull(remote(), "name", target)

        failures += until_it_works(proxy, chance, lambda: push(filled, "name", remote()), lambda: None)
        failures += until_it_works(proxy, chance, fetch, partial(_check_part, target, expected))
        assert [(each.reference, each.digest, each.tags) for each in target.list()] == expected
        assert len(target.attachments("name@v1")) == 1
        assert target.verify().ok
        assert list((target.root / ".partial").iterdir()) == []
    assert failures >= rounds, "hardly anything was cut"


def _check_part(target: Store, expected: list[tuple[str, str, tuple[str, ...]]]) -> None:
    assert target.verify().ok
    found = [(each.reference, each.digest) for each in target.list()]
    assert found == [(reference, digest) for reference, digest, _ in expected][: len(found)]


@needs_program("docker-registry")
def test_cut_at_random(filled: Store, proxy: CuttingProxy, prefix: str, tmp_path: Path) -> None:
    cut_at_random(SHORT, filled, proxy, prefix, tmp_path)


@pytest.mark.slow
@needs_program("docker-registry")
def test_cut_at_random_for_long(filled: Store, proxy: CuttingProxy, prefix: str, tmp_path: Path) -> None:
    cut_at_random(LONG, filled, proxy, prefix, tmp_path)


class Forger:
    """A source whose manifests are changed at random, with descriptors that fit what was made of them."""

    address = "oci://forger.example"

    def __init__(self, store: Store, chance: random.Random) -> None:
        self._honest = Folder(store)
        self._store = store
        self._chance = chance
        self._made: dict[str, bytes] = {}

    def _forge(self, name: str, found: Descriptor) -> Descriptor:
        data = bytearray(self._honest.manifest(name, found.digest))
        for _ in range(self._chance.randint(0, 4)):
            place = self._chance.randrange(len(data))
            kind = self._chance.random()
            if kind < 0.4:
                data[place] = self._chance.randrange(256)
            elif kind < 0.6:
                data[place] = self._chance.choice(b'0123456789"{}[],:/.-')
            elif kind < 0.8:
                del data[place : place + self._chance.randint(1, 60)]
            else:
                start = self._chance.randrange(len(data))
                data[place:place] = data[start : start + self._chance.randint(1, 200)]
            if not data:
                break
        digest = sha256(bytes(data))
        self._made[digest] = bytes(data)
        return found.model_copy(update={"digest": digest, "size": len(data), "media_type": MANIFEST_TYPE})

    def names(self) -> Sequence[str]:
        return self._honest.names()

    def tags(self, name: str) -> Mapping[str, Descriptor]:
        return {tag: self._forge(name, found) for tag, found in self._honest.tags(name).items()}

    def descriptor(self, name: str, reference: str) -> Descriptor | None:
        found = self._honest.descriptor(name, reference)
        return None if found is None else self._forge(name, found)

    def manifest(self, name: str, reference: str) -> bytes:
        return self._made[reference]

    def pull_blob(self, name: str, descriptor: Descriptor, target: BinaryIO, progress: Progress) -> None:
        self._honest.pull_blob(name, descriptor, target, progress)

    def referrers(self, name: str, digest: str) -> Sequence[Descriptor]:
        found = self._store.attachments("name@v1")
        self._honest.referrers(name, self._store.find("name@v1").digest)
        return [
            self._forge(name, each.descriptor).model_copy(update={"artifact_type": each.artifact_type})
            for each in found
        ]


def forge(rounds: int, store: Store, target: Store) -> None:
    honest = {each.digest for each in store.list()}
    refused = 0
    for number in range(rounds):
        try:
            done = pull(Forger(store, random.Random(number)), "name", target, name=f"n{number}")
            taken = {each.digest for each in done.versions}
        except ReftError as error:
            refused += 1
            assert str(error).isprintable()
            taken = {each.digest for each in target.list(f"n{number}")}
        for digest in taken - honest:  # changed, and still a manifest of the same adapter
            version = target.show(f"n{number}@{digest}")
            assert version.image_manifest["layers"][0]["digest"] in {
                store.show(each.reference).image_manifest["layers"][0]["digest"] for each in store.list()
            }
    assert rounds // 2 < refused < rounds
    assert target.verify().ok


def test_forged_manifests(store: Store, adapters: list[Path], other_store: Store) -> None:
    for adapter in adapters[:2]:
        store.add(adapter, "name")
    store.attach("name@v1", SIGNATURE_TYPE, {"signature.json": ("application/json", b"{}")})
    forge(150, store, other_store)


@pytest.mark.slow
def test_forged_manifests_for_long(store: Store, adapters: list[Path], other_store: Store) -> None:
    for adapter in adapters[:2]:
        store.add(adapter, "name")
    store.attach("name@v1", SIGNATURE_TYPE, {"signature.json": ("application/json", b"{}")})
    forge(10_000, store, other_store)
