"""Connections that break and registries that die in the middle: nothing is lost, and a retry sends what is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cutting_proxy import CuttingProxy
from docker_registry import DockerRegistry
from programs import needs_program

from adapters_store import Store
from adapters_store.remotes.address import Address
from adapters_store.remotes.registry import Registry
from adapters_store.remotes.remote import UnreachableError
from adapters_store.remotes.session import Patience
from adapters_store.remotes.transfer import pull, push
from reft_plugins.errors import UnknownReferenceError

pytestmark = needs_program("docker-registry")
HASTE = Patience(connect=5, silence=20, answer=30, retry_delay=0.05)
CHUNK = 1 << 20


def through(proxy: CuttingProxy, prefix: str, chunk: int = CHUNK) -> Registry:
    return Registry(Address("oci", prefix, f"127.0.0.1:{proxy.port}"), patience=HASTE, chunk=chunk)


@pytest.fixture
def large(store: Store, large_adapter: Path) -> int:
    """The bytes of the tensors of `large:prod`, which is in the store."""
    store.add(large_adapter, "large:prod")
    return (large_adapter / "adapter.safetensors").stat().st_size


def tensors_digest(store: Store) -> str:
    return str(store.show("large:prod").image_manifest["layers"][0]["digest"])


def test_one_cut_during_a_push_is_not_even_noticed(
    store: Store, large: int, proxy: CuttingProxy, prefix: str, other_store: Store
) -> None:
    """This registry cannot go on with an upload of which a part of a piece arrived, so it is begun again."""
    proxy.cut(after_sent=large * 2 // 3, times=1)
    push(store, "large:prod", through(proxy, prefix))
    assert proxy.cuts == 1
    assert large * 5 // 3 - CHUNK < proxy.sent < large * 5 // 3 + 100_000
    pull(through(proxy, prefix), "large:prod", other_store)
    assert other_store.verify().ok


def test_one_cut_during_a_pull_is_not_even_noticed(
    store: Store, large: int, proxy: CuttingProxy, prefix: str, other_store: Store
) -> None:
    push(store, "large:prod", through(proxy, prefix))
    proxy.cut(after_received=large * 2 // 3, times=1)
    pull(through(proxy, prefix), "large:prod", other_store)
    assert proxy.cuts == 1
    assert large < proxy.received < large + 100_000
    assert other_store.verify().ok


@pytest.mark.parametrize("chunk", [CHUNK, 1 << 30], ids=["in chunks", "in one piece"])
def test_a_push_that_keeps_breaking_leaves_nothing_visible_and_is_finished_later(
    store: Store,
    large: int,
    proxy: CuttingProxy,
    docker_registry: DockerRegistry,
    prefix: str,
    other_store: Store,
    chunk: int,
) -> None:
    proxy.cut(after_sent=large // 3, times=10**6)
    remote = through(proxy, prefix, chunk)
    with pytest.raises(UnreachableError, match=r"large: could not upload a blob.*what has arrived is not sent again"):
        push(store, "large:prod", remote)
    assert proxy.cuts >= 1
    assert tensors_digest(store) not in docker_registry.stored(f"{prefix}/large")
    proxy.reset()
    assert dict(remote.tags("large")) == {}
    with pytest.raises(UnknownReferenceError):
        pull(remote, "large:prod", other_store)
    proxy.reset()
    finished = push(store, "large:prod", through(proxy, prefix))
    assert finished.versions[0].tags == ("prod",)
    assert large < proxy.sent < large + 100_000
    pull(remote, "large:prod", other_store)
    assert other_store.find("large:prod").digest == store.find("large:prod").digest


def test_a_push_that_dies_between_blobs_sends_only_the_rest(
    store: Store, large: int, proxy: CuttingProxy, docker_registry: DockerRegistry, prefix: str
) -> None:
    """Died after the tensors, before the manifest: they are not sent again."""

    class Dies(Registry):
        def push_manifest(self, *arguments: object) -> None:
            raise UnreachableError("the cable was pulled")

    with pytest.raises(UnreachableError, match="cable"):
        push(store, "large:prod", Dies(Address("oci", prefix, f"127.0.0.1:{proxy.port}")))
    assert tensors_digest(store) in docker_registry.stored(f"{prefix}/large")
    assert dict(through(proxy, prefix).tags("large")) == {}
    proxy.reset()
    assert push(store, "large:prod", through(proxy, prefix)).bytes == 0
    assert proxy.sent < 20_000


def test_a_pull_that_keeps_breaking_leaves_nothing_visible_and_goes_on_where_it_broke(
    store: Store, large: int, proxy: CuttingProxy, prefix: str, other_store: Store
) -> None:
    remote = through(proxy, prefix)
    push(store, "large:prod", remote)
    arrived = 0
    for attempt in range(1, 4):
        if attempt == 1:
            proxy.cut(after_received=large // 2, on_cut=lambda: proxy.cut(after_received=1000, times=10**6))
        else:
            proxy.cut(after_received=2000, times=10**6)
        with pytest.raises(UnreachableError, match="could not"):
            pull(through(proxy, prefix), "large:prod", other_store)
        assert other_store.list() == ()
        assert other_store.verify().ok
        kept = [path.stat().st_size for path in (other_store.root / ".partial").glob("sha256-*")]
        assert kept == [pytest.approx(large // 2, rel=0.1)]
        assert kept[0] >= arrived
        arrived = kept[0]
    proxy.reset()
    pull(through(proxy, prefix), "large:prod", other_store)
    assert large - arrived < proxy.received < large - arrived + 50_000
    assert list((other_store.root / ".partial").iterdir()) == []
    assert other_store.verify().ok
    assert other_store.find("large:prod").digest == store.find("large:prod").digest


def test_what_was_kept_but_is_damaged_is_fetched_again(
    store: Store, large: int, proxy: CuttingProxy, prefix: str, other_store: Store
) -> None:
    push(store, "large:prod", through(proxy, prefix))
    digits = tensors_digest(store).removeprefix("sha256:")
    kept = other_store.root / ".partial" / f"sha256-{digits}"
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"x" * (large // 2))
    with pytest.raises(Exception, match=r"sends other content .* Nothing of it was kept"):
        pull(through(proxy, prefix), "large:prod", other_store)
    assert not kept.exists()
    pull(through(proxy, prefix), "large:prod", other_store)
    assert other_store.verify().ok


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_registry_that_is_killed_and_comes_back(
    store: Store, large: int, own_registry: DockerRegistry, other_store: Store, direction: str
) -> None:
    proxy = CuttingProxy(own_registry.port)
    remote = through(proxy, "team")
    move: dict[str, Callable[[], object]] = {
        "push": lambda: push(store, "large:prod", remote),
        "pull": lambda: pull(remote, "large:prod", other_store),
    }
    if direction == "pull":
        move["push"]()
    half = large // 2
    proxy.cut(
        after_sent=half if direction == "push" else None,
        after_received=half if direction == "pull" else None,
        times=1,
        on_cut=own_registry.kill,
    )
    with pytest.raises(UnreachableError, match="Check the address and the network and try again"):
        move[direction]()
    assert proxy.cuts == 1
    own_registry.start()
    proxy.reset()
    if direction == "push":
        assert dict(remote.tags("large")) == {}
    else:
        assert other_store.list() == ()
    move[direction]()
    if direction == "pull":
        assert proxy.received < large - half + CHUNK, "what had arrived was fetched again"
    assert pull(remote, "large:prod", other_store).versions[0].digest == store.find("large:prod").digest
    assert other_store.verify().ok
    proxy.close()


_PULLER = """
import sys
from adapters_store import Store
from adapters_store.remotes.transfer import connect, pull
pull(connect(sys.argv[1]), "large:prod", Store.open(sys.argv[2]))
"""


def test_a_puller_that_is_killed_goes_on_in_its_next_life(
    store: Store, large: int, proxy: CuttingProxy, prefix: str, other_store: Store
) -> None:
    push(store, "large:prod", through(proxy, prefix))
    pipe = os.pipe()
    proxy.cut(after_received=large // 2, on_cut=lambda: (os.write(pipe[1], b"x"), time.sleep(30)))
    command = [sys.executable, "-c", _PULLER, f"oci://127.0.0.1:{proxy.port}/{prefix}", str(other_store.root)]
    process = subprocess.Popen(command)
    os.read(pipe[0], 1)
    time.sleep(0.3)  # for what is on its way into the file
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert other_store.list() == ()
    assert other_store.verify().ok
    kept = [path.stat().st_size for path in (other_store.root / ".partial").glob("sha256-*")]
    assert kept[0] > large // 4
    proxy.reset()
    pull(through(proxy, prefix), "large:prod", other_store)
    assert proxy.received < large - kept[0] + 50_000
    assert other_store.verify().ok


def test_two_pullers_of_the_same_blob_do_not_harm_each_other(
    store: Store, large: int, proxy: CuttingProxy, prefix: str, other_store: Store
) -> None:
    push(store, "large:prod", through(proxy, prefix))
    command = [sys.executable, "-c", _PULLER, f"oci://127.0.0.1:{proxy.port}/{prefix}", str(other_store.root)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(other_store.list()) == 1
    assert list((other_store.root / ".partial").iterdir()) == []
    assert other_store.verify().ok
