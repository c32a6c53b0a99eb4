"""A real registry, and a second program that reads what we wrote and writes what we read."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from adapter_variants import flip_bit, vary
from cutting_proxy import CuttingProxy
from docker_registry import PASSWORD, USER, DockerRegistry, skopeo, skopeo_json
from programs import needs_program

from adapters_store import Store
from adapters_store.layout.oci import CERTIFICATE_TYPE, SIGNATURE_TYPE, Descriptor
from adapters_store.remotes.remote import Remote, UnreachableError
from adapters_store.remotes.transfer import IncompleteTransferError, connect, copy, pull, push
from reft_plugins.errors import StoreError, UnknownReferenceError, VersionConflictError

pytestmark = needs_program("docker-registry", "skopeo")
DOCKER_TYPE = "application/vnd.docker.distribution.manifest.v2+json"


def remote_at(address: str) -> Remote:
    found = connect(address)
    assert not isinstance(found, Store)
    return found


def content(store: Store) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Digest and tags of every version."""
    return {record.reference: (record.digest, record.tags) for record in store.list()}


@pytest.fixture
def filled(store: Store, adapters: list[Path]) -> Store:
    """Three versions; the first is signed, and the second certified twice."""
    store.add(adapters[0], "team/sentiment:first")
    store.add(adapters[1], "team/sentiment:prod")
    store.add(adapters[2], "team/sentiment:latest")
    store.attach("team/sentiment@v1", SIGNATURE_TYPE, {"signature.json": ("application/json", b'{"signed": 1}')})
    for number in (1, 2):
        certificate = json.dumps({"certificate": number}).encode()
        store.attach("team/sentiment@v2", CERTIFICATE_TYPE, {"certificate.json": ("application/json", certificate)})
    return store


def test_a_name_goes_out_and_comes_back(
    filled: Store, other_store: Store, docker_registry: DockerRegistry, prefix: str, adapters: list[Path]
) -> None:
    address = docker_registry.address(prefix)
    sent = push(filled, "team/sentiment", connect(address))
    assert [(each.version, each.new, each.tags, len(each.attachments)) for each in sent.versions] == [
        (1, True, ("first",), 1),
        (2, True, ("prod",), 2),
        (3, True, ("latest",), 0),
    ]
    fetched = pull(connect(address), "team/sentiment", other_store)
    assert fetched.bytes == sent.bytes > sum(record.size for record in filled.list())
    assert content(other_store) == content(filled)
    for reference in content(filled):
        assert [(each.descriptor.digest, each.artifact_type) for each in other_store.attachments(reference)] == [
            (each.descriptor.digest, each.artifact_type) for each in filled.attachments(reference)
        ]
    for adapter, version in zip(adapters, (1, 2, 3), strict=True):
        checked_out = other_store.checkout(f"team/sentiment@v{version}")
        for name in ("adapter.json", "adapter.safetensors"):
            assert (checked_out / name).read_bytes() == (adapter / name).read_bytes()
    assert other_store.verify().ok


def test_what_is_there_is_not_sent_again(
    filled: Store,
    other_store: Store,
    docker_registry: DockerRegistry,
    proxy: CuttingProxy,
    prefix: str,
    large_adapter: Path,
    tmp_path: Path,
) -> None:
    """The bytes on the wire, counted outside of our code."""
    size = (large_adapter / "adapter.safetensors").stat().st_size
    address = f"oci://127.0.0.1:{proxy.port}/{prefix}"
    filled.add(large_adapter, "large:one")
    first = push(filled, "large", connect(address))
    assert first.bytes > size
    assert proxy.sent > size
    proxy.reset()
    again = push(filled, "large", connect(address))
    assert (again.bytes, [each.new for each in again.versions]) == (0, [False])
    assert proxy.sent < 20_000
    proxy.reset()
    filled.add(vary(large_adapter, tmp_path / "variant", "same tensors"), "large:two")
    assert push(filled, "large", connect(address)).bytes < 20_000
    assert proxy.sent < 40_000
    proxy.reset()
    pull(connect(address), "large@v1", other_store)
    assert proxy.received > size
    proxy.reset()
    assert pull(connect(address), "large", other_store).bytes < 20_000
    assert proxy.received < 40_000
    assert content(other_store)["large@v2"] == content(filled)["large@v2"]


def test_skopeo_reads_what_was_pushed(
    filled: Store, docker_registry: DockerRegistry, prefix: str, tmp_path: Path
) -> None:
    push(filled, "team/sentiment", connect(docker_registry.address(prefix)))
    image = f"docker://{docker_registry.host}/{prefix}/team/sentiment"
    tags = skopeo_json("list-tags", "--tls-verify=false", image)["Tags"]
    referrers = [tag for tag in tags if tag.startswith("sha256-")]
    assert sorted(set(tags) - set(referrers)) == ["first", "latest", "prod", "v1", "v2", "v3"]
    assert sorted(referrers) == sorted(filled.find(f"team/sentiment@v{n}").digest.replace(":", "-") for n in (1, 2))
    raw = skopeo("inspect", "--raw", "--tls-verify=false", f"{image}:prod").encode()
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == filled.find("team/sentiment:prod").digest
    for tag in referrers:
        index = skopeo_json("inspect", "--raw", "--tls-verify=false", f"{image}:{tag}")
        assert index["mediaType"] == "application/vnd.oci.image.index.v1+json"
        assert {each["artifactType"] for each in index["manifests"]} <= {SIGNATURE_TYPE, CERTIFICATE_TYPE}
    skopeo("copy", "--src-tls-verify=false", f"{image}:v2", f"oci:{tmp_path / 'layout'}:copied")
    index = json.loads((tmp_path / "layout/index.json").read_text())
    assert [each["digest"] for each in index["manifests"]] == [filled.find("team/sentiment@v2").digest]


def test_skopeo_pushes_a_version_of_the_store_itself_and_we_pull_it(
    filled: Store, other_store: Store, docker_registry: DockerRegistry, prefix: str
) -> None:
    image = f"{docker_registry.host}/{prefix}/foreign"
    source = f"oci:{filled.root}:team/sentiment"
    skopeo("copy", "--dest-tls-verify=false", f"{source}@v2", f"docker://{image}:v7")
    skopeo("copy", "--dest-tls-verify=false", f"{source}@v3", f"docker://{image}:only-a-tag")
    fetched = pull(connect(docker_registry.address(prefix)), "foreign", other_store)
    assert [(each.version, each.tags) for each in fetched.versions] == [(7, ()), (8, ("only-a-tag",))]
    assert other_store.find("foreign@v7").digest == filled.find("team/sentiment@v2").digest
    assert other_store.verify().ok


def test_one_version_by_tag_number_and_digest(
    filled: Store, other_store: Store, docker_registry: DockerRegistry, prefix: str
) -> None:
    remote = connect(docker_registry.address(prefix))
    digest = filled.find("team/sentiment@v1").digest
    pushed = push(filled, "team/sentiment:prod", remote), push(filled, f"team/sentiment@{digest}", remote)
    assert [(each.versions[0].version, each.versions[0].tags) for each in pushed] == [(2, ("prod",)), (1, ())]
    for reference, expected in (
        ("team/sentiment:prod", {"team/sentiment@v2"}),
        ("team/sentiment:v1", {"team/sentiment@v2", "team/sentiment@v1"}),
    ):
        pull(remote, reference, other_store)
        assert set(content(other_store)) == expected
    assert content(other_store)["team/sentiment@v2"] == (filled.find("team/sentiment@v2").digest, ("prod",))
    assert content(other_store)["team/sentiment@v1"] == (digest, ())
    with pytest.raises(UnknownReferenceError, match=r"team/sentiment:v3: not there\. It has: prod, v1, v2"):
        pull(remote, "team/sentiment@v3", other_store)
    with pytest.raises(UnknownReferenceError, match="no adapter of this name"):
        pull(remote, "team/other", other_store)
    with pytest.raises(UnknownReferenceError):
        push(filled, "team/sentiment:nowhere", remote)


def test_versions_never_change_and_tags_move(
    filled: Store, other_store: Store, docker_registry: DockerRegistry, prefix: str, adapters: list[Path]
) -> None:
    remote = connect(docker_registry.address(prefix))
    push(filled, "team/sentiment", remote)
    other_store.add(adapters[2], "team/sentiment:latest")
    mine = other_store.add(vary(adapters[0], other_store.root.parent / "mine", "mine"), "team/sentiment:prod")
    with pytest.raises(VersionConflictError, match=r"sentiment:v2 is other content .*--as NAME.*--renumber"):
        push(other_store, mine.reference, remote)
    with pytest.raises(IncompleteTransferError) as raised:
        push(other_store, "team/sentiment", remote)
    assert [each.version for each in raised.value.transfer.versions] == [3], "known there under another number"
    assert len(raised.value.errors) == 1
    before = filled.find("team/sentiment:prod").digest
    moved = push(other_store, "team/sentiment:prod", remote, renumber=True).versions[0]
    assert (moved.version, moved.tags, moved.replaced) == (4, ("prod",), {"prod": before})
    assert pull(remote, "team/sentiment:prod", filled).versions[0].replaced == {"prod": before}
    assert content(filled)["team/sentiment@v4"] == (mine.digest, ("prod",))
    push(other_store, mine.reference, remote, name="team/mine")
    assert pull(remote, "team/mine@v2", filled).versions[0].digest == mine.digest


def test_two_machines_are_merged_by_pulling(
    filled: Store, other_store: Store, docker_registry: DockerRegistry, prefix: str, adapters: list[Path]
) -> None:
    """The same name grew on both: nothing of either is lost, whatever is chosen."""
    remote = connect(docker_registry.address(prefix))
    other_store.add(adapters[1], "team/sentiment:theirs")
    other_store.add(vary(adapters[0], other_store.root.parent / "mine", "mine"), "team/sentiment")
    other_store.add(adapters[0], "other:latest")
    before = content(other_store)
    push(filled, "team/sentiment", remote)
    with pytest.raises(
        IncompleteTransferError, match=r"1 refused, 2 complete.*sentiment@v1 is other content"
    ) as raised:
        pull(remote, "team/sentiment", other_store)
    assert [type(error) for error in raised.value.errors] == [VersionConflictError]
    refused = content(other_store)
    assert {name: digest for name, (digest, _) in before.items()}.items() <= {
        name: digest for name, (digest, _) in refused.items()
    }.items()
    assert refused["team/sentiment@v1"][1] == ("prod", "theirs"), "their tag, and ours for the same content"
    assert refused["team/sentiment@v3"][1] == ("latest",)
    pull(remote, "team/sentiment", other_store, renumber=True)
    merged = content(other_store)
    assert merged["team/sentiment@v4"] == (filled.find("team/sentiment@v1").digest, ("first",))
    assert pull(remote, "team/sentiment", other_store, name="team/theirs").versions[0].reference == "team/theirs@v1"
    everything = {digest for digest, _ in content(filled).values()} | {digest for digest, _ in before.values()}
    assert everything == {digest for digest, _ in content(other_store).values()}
    assert other_store.verify().ok


def test_copy_between_registries_and_stores(
    filled: Store, other_store: Store, docker_registry: DockerRegistry, prefix: str
) -> None:
    first, second = (connect(docker_registry.address(f"{prefix}/{name}")) for name in ("a", "b"))
    push(filled, "team/sentiment", first)
    copied = copy(first, "team/sentiment", second)
    assert [(each.version, each.new, len(each.attachments)) for each in copied.versions] == [
        (1, True, 1),
        (2, True, 2),
        (3, True, 0),
    ]
    assert copy(first, "team/sentiment:prod", second).bytes == 0
    copy(second, "team/sentiment", other_store)
    assert content(other_store) == content(filled)
    third = Store.init(other_store.root.parent / "third")
    copy(filled, "team/sentiment:prod", third, name="renamed")
    assert content(third) == {"renamed@v2": (filled.find("team/sentiment@v2").digest, ("prod",))}
    assert len(third.attachments("renamed@v2")) == 2


def test_names_and_tags_of_a_registry(filled: Store, docker_registry: DockerRegistry, prefix: str) -> None:
    remote = remote_at(docker_registry.address(prefix))
    assert remote.names() == []
    push(filled, "team/sentiment@v1", remote)
    push(filled, "team/sentiment:prod", remote, name="flat")
    assert remote.names() == ["flat", "team/sentiment"]
    assert sorted(remote.tags("flat")) == ["prod", "v2"]
    assert remote.tags("flat")["prod"].digest == filled.find("team/sentiment:prod").digest
    assert dict(remote.tags("nothing")) == {}


def test_tags_that_mean_something_else_there_are_refused(
    filled: Store, docker_registry: DockerRegistry, prefix: str
) -> None:
    remote = remote_at(docker_registry.address(prefix))
    filled.tag("team/sentiment@v1", "v3")
    with pytest.raises(StoreError, match=r"'v3' means version 3\. .*reft store untag team/sentiment:v3"):
        push(filled, "team/sentiment:v3", remote)
    filled.untag("team/sentiment:v3")
    filled.tag("team/sentiment@v3", "v3")
    assert push(filled, "team/sentiment", remote).versions[2].tags == ("latest",)
    hidden = "sha256-" + "0" * 64
    filled.tag("team/sentiment@v1", hidden)
    with pytest.raises(StoreError, match="signatures under tags of this form"):
        push(filled, f"team/sentiment:{hidden}", remote)


def test_container_images_are_refused_by_type(
    filled: Store, other_store: Store, docker_registry: DockerRegistry, prefix: str, tmp_path: Path
) -> None:
    remote = remote_at(docker_registry.address(prefix))
    push(filled, "team/sentiment:prod", remote)
    (tmp_path / "config").write_bytes(b'{"architecture": "amd64", "os": "linux"}')
    config = _descriptor("application/vnd.docker.container.image.v1+json", (tmp_path / "config").read_bytes())
    remote.push_blob("team/sentiment", config, tmp_path / "config", lambda count: None)
    image = {"schemaVersion": 2, "mediaType": DOCKER_TYPE, "config": config.to_data(), "layers": []}
    data = json.dumps(image).encode()
    remote.push_manifest("team/sentiment", "v1", _descriptor(DOCKER_TYPE, data), data)
    with pytest.raises(StoreError, match=r"is 'application/vnd\.docker.*', not an adapter"):
        pull(remote, "team/sentiment@v1", other_store)
    with pytest.raises(IncompleteTransferError, match=r"1 refused, 1 complete.*not an adapter"):
        pull(remote, "team/sentiment", other_store)
    assert set(content(other_store)) == {"team/sentiment@v2"}


def test_a_damaged_blob_here_is_not_sent_and_is_mended_by_pulling(
    filled: Store, docker_registry: DockerRegistry, prefix: str
) -> None:
    remote = connect(docker_registry.address(prefix))
    push(filled, "team/sentiment@v1", remote)
    for version in (1, 2):
        layer = filled.show(f"team/sentiment@v{version}").image_manifest["layers"][0]["digest"]
        flip_bit(filled.blobs.path(layer))
    with pytest.raises(StoreError, match="damaged"):
        push(filled, "team/sentiment@v2", remote)
    assert not filled.verify().ok
    assert pull(remote, "team/sentiment@v1", filled).bytes > 0
    filled.checkout("team/sentiment@v1")
    assert len(filled.verify().problems) == 1


@pytest.fixture(scope="module")
def guarded_registry(tmp_path_factory: pytest.TempPathFactory) -> DockerRegistry:
    registry = DockerRegistry(tmp_path_factory.mktemp("guarded"), login=True)
    yield registry
    registry.kill()


def _log_in(folder: Path, document: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(document))


def test_login_of_docker_is_used(
    filled: Store, other_store: Store, guarded_registry: DockerRegistry, no_login: Path, prefix: str
) -> None:
    address, host = guarded_registry.address(prefix), guarded_registry.host
    with pytest.raises(UnreachableError, match=rf"401 Unauthorized.*docker login {host}"):
        push(filled, "team/sentiment", connect(address))
    wrong = base64.b64encode(f"{USER}:wrong".encode()).decode()
    _log_in(no_login, {"auths": {host: {"auth": wrong}}})
    with pytest.raises(UnreachableError, match="401 Unauthorized"):
        push(filled, "team/sentiment", connect(address))
    right = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    _log_in(no_login, {"auths": {f"https://{host}/v1/": {"auth": right}}})
    push(filled, "team/sentiment", connect(address))
    pull(connect(address), "team/sentiment", other_store)
    assert content(other_store) == content(filled)


def test_credential_helpers_are_asked(
    filled: Store,
    guarded_registry: DockerRegistry,
    no_login: Path,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    helper = tmp_path / "bin" / "docker-credential-pocket"
    helper.parent.mkdir()
    answer = json.dumps({"ServerURL": guarded_registry.host, "Username": USER, "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\nread host\n[ \"$host\" = {guarded_registry.host} ] && echo '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(helper.parent), prepend=":")
    _log_in(no_login, {"credHelpers": {guarded_registry.host: "pocket"}})
    assert push(filled, "team/sentiment", connect(guarded_registry.address(prefix))).versions[0].new
    _log_in(no_login, {"credsStore": "pocket"})
    assert not push(filled, "team/sentiment", connect(guarded_registry.address(prefix))).versions[0].new


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": 3}', '{"auths": {"a": 3}}'])
def test_a_docker_configuration_that_cannot_be_read_is_named(
    text: str, filled: Store, guarded_registry: DockerRegistry, no_login: Path, prefix: str
) -> None:
    (no_login / "config.json").write_text(text)
    with pytest.raises(StoreError, match=r"docker/config\.json: not a docker configuration"):
        push(filled, "team/sentiment", connect(guarded_registry.address(prefix)))


def _descriptor(media_type: str, data: bytes) -> Descriptor:
    return Descriptor(mediaType=media_type, digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data))
