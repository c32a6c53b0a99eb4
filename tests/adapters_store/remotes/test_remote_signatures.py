"""Signatures go through a registry that knows nothing of them, and are worth as much on the other machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from docker_registry import DockerRegistry
from programs import needs_program

from adapters_store import Store
from adapters_store.layout.oci import SIGNATURE_TYPE
from adapters_store.remotes.transfer import connect, pull, push
from adapters_store.resolve import resolve
from adapters_store.trust.bundles import BUNDLE_TYPE
from adapters_store.trust.keys import generate, read_public_keys
from adapters_store.trust.signing import SIGNATURE_FILE, sign, verify
from reft_plugins.errors import UntrustedError

pytestmark = needs_program("docker-registry")


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private key; the policy wants signatures by it of everything."""
    private, _ = generate(tmp_path / "release.pem")
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rules]]\nnames = ["*"]\nkeys = ["release.pub"]\n')
    monkeypatch.setenv("REFT_POLICY", str(policy))
    return private


def test_what_was_signed_here_is_admitted_there(
    store: Store,
    other_store: Store,
    adapters: list[Path],
    docker_registry: DockerRegistry,
    prefix: str,
    release: Path,
) -> None:
    for number in range(2):
        store.add(adapters[number], "sentiment:latest")
    sign(store, "sentiment@v1", release)
    remote = connect(docker_registry.address(prefix))
    push(store, "sentiment", remote)
    pull(remote, "sentiment", other_store)
    (public,) = read_public_keys([release.with_suffix(".pub")])
    assert verify(other_store, "sentiment@v1", [public]).signers == (public,)
    assert other_store.resolve("sentiment@v1") is not None
    with pytest.raises(UntrustedError, match="carries no signature"):
        other_store.resolve("sentiment:latest")
    sign(store, "sentiment@v2", release)  # which the other machine lacks until it pulls again
    push(store, "sentiment", remote)
    with pytest.raises(UntrustedError, match="carries no signature"):
        other_store.resolve("sentiment:latest")
    pull(remote, "sentiment", other_store)
    assert other_store.resolve("sentiment:latest") is not None


def test_whoever_may_push_cannot_make_others_trust_it(
    store: Store,
    other_store: Store,
    adapters: list[Path],
    docker_registry: DockerRegistry,
    prefix: str,
    release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.add(adapters[0], "sentiment:latest")
    made = sign(store, "sentiment:latest", release)
    remote = connect(docker_registry.address(prefix))
    push(store, "sentiment", remote)

    intruder = Store.init(tmp_path / "intruder")
    pull(remote, "sentiment", intruder)
    intruder.add(adapters[1], "sentiment:latest")
    stolen = store.blobs.read(made.files[SIGNATURE_FILE], 100_000)
    intruder.attach("sentiment:latest", SIGNATURE_TYPE, {SIGNATURE_FILE: (BUNDLE_TYPE, stolen)})
    sign(intruder, "sentiment:latest", generate(tmp_path / "intruder.pem")[0])
    push(intruder, "sentiment", remote)

    pull(remote, "sentiment", other_store)
    assert len(other_store.attachments("sentiment:latest", SIGNATURE_TYPE)) == 2
    with pytest.raises(UntrustedError, match="signs other files"):
        other_store.resolve("sentiment:latest")
    assert other_store.resolve("sentiment@v1") is not None
    with pytest.raises(UntrustedError, match="signed by another key"):
        resolve(f"{docker_registry.address(prefix)}/sentiment:latest")
    assert resolve(f"{docker_registry.address(prefix)}/sentiment:v1") is not None
