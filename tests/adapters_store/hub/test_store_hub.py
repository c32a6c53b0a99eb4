"""Adapters travel through repositories of the Hugging Face Hub, by its own client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from adapter_variants import vary
from hub_stand_in import Call, Hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from adapters_store import Store
from adapters_store.layout.oci import SIGNATURE_TYPE, TITLE, Descriptor, ImageManifest
from adapters_store.remotes.hub import HubRemote
from adapters_store.remotes.transfer import connect, pull, push
from reft_plugins.errors import StoreError, UnknownReferenceError, VersionConflictError

REPOSITORY = "acme/sentiment"
ADDRESS = f"hf://{REPOSITORY}"


def _writes(hub: Hub) -> list[Call]:
    return [call for call in hub.calls if call.writes]


def test_everything_of_a_name_goes_there_and_back(
    hub: Hub, three_versions: Store, other_store: Store, adapters: list[Path]
) -> None:
    sent = push(three_versions, "sentiment", connect(ADDRESS))
    assert [each.new for each in sent.versions] == [True, True, True]

    repository = hub.repositories[REPOSITORY]
    assert sorted(repository.tags) == ["first", "latest", "v1", "v2", "v3"]
    assert repository.branches.keys() == {"main"}
    for adapter, tag in zip(adapters, ("v1", "v2", "v3"), strict=True):
        files = repository.commits[repository.tags[tag]]
        for name in ("adapter.json", "adapter.safetensors"):
            assert files[name].content == (adapter / name).read_bytes()
        assert files["adapter.safetensors"].lfs
    assert repository.tags["first"] == repository.tags["v1"]
    assert repository.tags["latest"] == repository.tags["v3"]
    main = repository.commits[repository.branches["main"]]
    assert main["adapter.json"].content == (adapters[2] / "adapter.json").read_bytes()
    digest = three_versions.find("sentiment@v2").digest.replace(":", "-")
    assert [path for path in main if path.startswith(f"attachments/{digest}/") and path.endswith("/signature.json")]

    pull(connect(ADDRESS), "sentiment", other_store)
    ours, theirs = three_versions.list(), other_store.list()
    assert [(r.reference, r.digest, r.tags) for r in theirs] == [(r.reference, r.digest, r.tags) for r in ours]
    for version in ("sentiment@v1", "sentiment@v2", "sentiment@v3"):
        there = [(each.descriptor, each.artifact_type, each.files) for each in other_store.attachments(version)]
        assert there == [
            (each.descriptor, each.artifact_type, each.files) for each in three_versions.attachments(version)
        ]
    assert len(other_store.attachments("sentiment@v2", SIGNATURE_TYPE)) == 1
    report = other_store.verify()
    assert (report.ok, report.versions, report.unreferenced) == (True, 3, 0), report.problems
    assert not (other_store.root.parent / "hf-cache").exists()


def test_whoever_downloads_a_version_has_an_adapter_directory(
    hub: Hub, three_versions: Store, other_store: Store, tmp_path: Path
) -> None:
    push(three_versions, "sentiment", connect(ADDRESS))
    for version in ("v1", "v2", "v3"):
        folder = snapshot_download(REPOSITORY, revision=version, local_dir=tmp_path / version)
        added = other_store.add(folder, f"downloaded:{version}")
        assert added.digest == three_versions.find(f"sentiment@{version}").digest


def test_one_version_and_one_tag(hub: Hub, three_versions: Store, other_store: Store) -> None:
    push(three_versions, "sentiment:latest", connect(ADDRESS))
    assert sorted(hub.repositories[REPOSITORY].tags) == ["latest", "v3"]
    pull(connect(ADDRESS), "sentiment:latest", other_store, name="mood")
    assert [(r.reference, r.tags) for r in other_store.list()] == [("mood@v3", ("latest",))]
    push(three_versions, "sentiment@v1", connect(ADDRESS))
    pull(connect(ADDRESS), "sentiment@v1", other_store, name="mood")
    assert other_store.find("mood@v1").digest == three_versions.find("sentiment@v1").digest
    with pytest.raises(UnknownReferenceError, match="v1"):
        pull(connect(ADDRESS), "sentiment@v2", other_store)


def test_the_newest_version_is_main_whatever_comes_later(hub: Hub, three_versions: Store, adapters: list[Path]) -> None:
    for version in ("v3", "v1", "v2"):
        push(three_versions, f"sentiment@{version}", connect(ADDRESS))
    repository = hub.repositories[REPOSITORY]
    assert repository.branches.keys() == {"main"}
    for number, adapter in enumerate(adapters, 1):
        files = repository.commits[repository.tags[f"v{number}"]]
        assert files["adapter.json"].content == (adapter / "adapter.json").read_bytes()
    main = repository.commits[repository.branches["main"]]
    assert main["adapter.json"].content == (adapters[2] / "adapter.json").read_bytes()


def test_nothing_is_sent_twice(hub: Hub, three_versions: Store, adapters: list[Path], tmp_path: Path) -> None:
    push(three_versions, "sentiment", connect(ADDRESS))
    uploads = [call for call in hub.calls if call.method == "PUT"]
    assert len(uploads) == 3
    hub.calls.clear()
    again = push(three_versions, "sentiment", connect(ADDRESS))
    assert [each.new for each in again.versions] == [False, False, False]
    assert _writes(hub) == []
    three_versions.add(vary(adapters[0], tmp_path / "varied", "same tensors"), "sentiment:latest")
    push(three_versions, "sentiment:latest", connect(ADDRESS))
    assert [call for call in hub.calls if call.method == "PUT"] == []
    assert len([call for call in hub.calls if "/commit/" in call.path]) == 1


def test_a_tag_moves(hub: Hub, three_versions: Store, other_store: Store) -> None:
    push(three_versions, "sentiment", connect(ADDRESS))
    three_versions.tag("sentiment@v1", "latest")
    hub.calls.clear()
    moved = push(three_versions, "sentiment:latest", connect(ADDRESS)).versions[0]
    assert moved.tags == ("latest",)
    assert moved.replaced == {"latest": three_versions.find("sentiment@v3").digest}
    assert [(call.method, call.path.split("/")[-2]) for call in _writes(hub)] == [("DELETE", "tag"), ("POST", "tag")]
    pull(connect(ADDRESS), "sentiment:latest", other_store)
    assert other_store.find("sentiment:latest").digest == three_versions.find("sentiment@v1").digest


def test_versions_never_change(hub: Hub, store: Store, other_store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    other_store.add(adapters[1], "sentiment:latest")
    push(store, "sentiment", connect(ADDRESS))
    before = dict(hub.repositories[REPOSITORY].tags)
    with pytest.raises(VersionConflictError, match="versions never change"):
        push(other_store, "sentiment", connect(ADDRESS))
    assert hub.repositories[REPOSITORY].tags == before
    push(other_store, "sentiment", connect(ADDRESS), renumber=True)
    assert sorted(hub.repositories[REPOSITORY].tags) == ["latest", "v1", "v2"]
    pull(connect(ADDRESS), "sentiment", store)
    assert [record.digest for record in store.list()] == [store.list()[0].digest, other_store.list()[0].digest]


def test_a_push_between_look_and_tag_is_noticed(
    hub: Hub, store: Store, other_store: Store, adapters: list[Path]
) -> None:
    """Somebody else's version 1 arrives after ours was found to be new."""
    store.add(adapters[0], "sentiment")
    other_store.add(adapters[1], "sentiment")

    def meanwhile(call: Call) -> None:
        if "/commit/" in call.path:
            hub.intercept = lambda call: None
            push(other_store, "sentiment", connect(ADDRESS))

    hub.intercept = meanwhile
    with pytest.raises(StoreError, match="somebody else changed the repository meanwhile"):
        push(store, "sentiment", connect(ADDRESS))
    repository = hub.repositories[REPOSITORY]
    for commit in (repository.tags["v1"], repository.branches["main"]):
        content = repository.commits[commit]["adapter.json"].content
        assert content == (adapters[1] / "adapter.json").read_bytes()
    with pytest.raises(VersionConflictError):
        push(store, "sentiment", connect(ADDRESS))


def test_not_even_the_remote_itself_moves_a_version(hub: Hub, store: Store, adapters: list[Path]) -> None:
    """What `push` checks first may have changed when the tag is written."""
    store.add(adapters[0], "sentiment")
    store.add(adapters[1], "sentiment")
    push(store, "sentiment@v1", connect(ADDRESS))
    before = dict(hub.repositories[REPOSITORY].tags)
    remote, descriptor = HubRemote(REPOSITORY), store.descriptor("sentiment@v2")
    image = ImageManifest.parse(store.blobs.read(descriptor, descriptor.size), "test")
    for blob in (image.config, *image.layers):
        remote.push_blob("sentiment", blob, store.blobs.path(blob.digest), lambda count: None)
    with pytest.raises(VersionConflictError, match="versions never change"):
        remote.push_manifest("sentiment", "v1", descriptor, image.to_json())
    assert hub.repositories[REPOSITORY].tags == before


def test_the_model_card_is_written_once(hub: Hub, store: Store, adapters: list[Path], tmp_path: Path) -> None:
    manifest = json.loads((adapters[0] / "adapter.json").read_text())
    manifest["base"]["name"] = "acme/base-1b"
    named = vary(adapters[0], tmp_path / "named", "")
    (named / "adapter.json").write_text(json.dumps(manifest))
    store.add(named, "sentiment")
    store.add(adapters[1], "sentiment")
    push(store, "sentiment@v1", connect(ADDRESS))
    repository = hub.repositories[REPOSITORY]
    card = repository.commits[repository.branches["main"]]["README.md"].content.decode()
    facts = yaml.safe_load(card.split("---\n")[1])
    assert (facts["library_name"], facts["base_model"]) == ("reft-plugins", "acme/base-1b")
    assert {"reft-plugins", "loreft"} <= set(facts["tags"])
    assert f"reft store pull {ADDRESS}" in card
    HfApi().upload_file(path_or_fileobj=b"---\nlicense: mit\n---\nMine.", path_in_repo="README.md", repo_id=REPOSITORY)
    push(store, "sentiment@v2", connect(ADDRESS))
    assert repository.commits[repository.tags["v2"]]["README.md"].content.endswith(b"Mine.")


def test_a_local_base_is_not_claimed_to_be_on_the_hub(hub: Hub, store: Store, adapters: list[Path]) -> None:
    """The Hub refuses cards whose base model is none of its own."""
    store.add(adapters[0], "sentiment")
    push(store, "sentiment", connect(ADDRESS))
    repository = hub.repositories[REPOSITORY]
    card = repository.commits[repository.branches["main"]]["README.md"].content.decode()
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "`tiny-llama`" in card


def test_new_repositories_are_private(hub: Hub, store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment")
    push(store, "sentiment", HubRemote("acme/secret"))
    push(store, "sentiment", HubRemote("acme/open", private=False))
    assert hub.private == {"acme/secret"}


def test_a_repository_holds_one_adapter(hub: Hub, store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment")
    store.add(adapters[1], "topics")
    store.add(adapters[2], "topics")
    remote = connect(ADDRESS)
    push(store, "sentiment", remote)
    with pytest.raises(StoreError, match="holds one adapter"):
        push(store, "topics@v2", remote)
    assert sorted(hub.repositories[REPOSITORY].tags) == ["v1"]


def test_a_tag_cannot_be_called_like_a_branch(hub: Hub, store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:main")
    store.add(adapters[1], "sentiment")
    push(store, "sentiment@v2", connect(ADDRESS))
    with pytest.raises(StoreError, match="has a branch 'main'"):
        push(store, "sentiment:main", connect(ADDRESS))
    assert sorted(hub.repositories[REPOSITORY].tags) == ["v1", "v2"]


def test_a_repository_made_by_hand(hub: Hub, other_store: Store, adapters: list[Path]) -> None:
    api = HfApi()
    api.create_repo("acme/By.Hand", private=False)
    api.upload_folder(repo_id="acme/By.Hand", folder_path=adapters[0], allow_patterns=["adapter.*"])
    pull(connect("hf://acme/By.Hand"), "by.hand", other_store)
    assert [(r.reference, r.tags) for r in other_store.list()] == [("by.hand@v1", ("main",))]
    assert (other_store.checkout("by.hand:main") / "adapter.json").read_bytes() == (
        adapters[0] / "adapter.json"
    ).read_bytes()


def test_the_users_own_cache_is_used_if_it_is_right(
    hub: Hub, three_versions: Store, other_store: Store, tmp_path: Path
) -> None:
    push(three_versions, "sentiment", connect(ADDRESS))
    for version in ("v1", "v2"):
        cached = hf_hub_download(REPOSITORY, "adapter.safetensors", revision=version)
    Path(cached).resolve().write_bytes(b"poisoned")
    hub.calls.clear()
    pull(connect(ADDRESS), "sentiment", other_store)
    fetched = {call.path.rpartition("/")[2] for call in hub.calls if call.path.startswith("/large-storage/")}
    wanted = [
        three_versions.show(f"sentiment@{each}").image_manifest["layers"][0]["digest"][7:] for each in ("v2", "v3")
    ]
    assert fetched == set(wanted)
    assert other_store.verify().ok


def test_an_image_manifest_of_another_program_would_be_lost(hub: Hub, store: Store, adapters: list[Path]) -> None:
    details_of = store.add(adapters[0], "sentiment")
    data = {**store.show("sentiment@v1").image_manifest}
    data["annotations"] = {**data["annotations"], TITLE: "by another program"}
    document = ImageManifest.parse_data(data, "test").to_json()
    with store.writing():
        digest = store.blobs.put(document)
        store.blobs.sync()
        descriptor = Descriptor(mediaType=data["mediaType"], digest=digest, size=len(document))
        record = store.adopt("foreign", descriptor)
    assert record.digest != details_of.digest
    with pytest.raises(StoreError, match="written by another program"):
        push(store, "foreign", connect(ADDRESS))
    assert hub.repositories[REPOSITORY].tags == {}


def test_what_there_is(hub: Hub, three_versions: Store) -> None:
    remote = connect(ADDRESS)
    assert isinstance(remote, HubRemote)
    assert (list(remote.names()), dict(remote.tags("sentiment"))) == ([], {})
    push(three_versions, "sentiment", remote)
    assert list(remote.names()) == ["sentiment"]
    there = {tag: found.digest for tag, found in remote.tags("sentiment").items()}
    assert there == {
        **{f"v{record.version}": record.digest for record in three_versions.list()},
        **{tag: record.digest for record in three_versions.list() for tag in record.tags},
    }
