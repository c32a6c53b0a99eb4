"""What a remote holds, told from its manifests; no blob is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adapters_store.filters import Filter
from adapters_store.layout.oci import ARTIFACT_TYPE, BASE, METHOD, ImageManifest, load_json
from adapters_store.remotes.address import Address, locate
from adapters_store.remotes.folder import Folder
from adapters_store.remotes.remote import Source, UnreachableError, numbers, version_number, where
from adapters_store.remotes.transfer import connect
from adapters_store.store import Store
from reft_plugins.errors import StoreError, UnknownReferenceError

_ALL = Filter()


@dataclass(frozen=True, slots=True)
class RemoteVersion:
    """One adapter at a remote.

    Attributes:
        name, digest: as in a store's record.
        version: None for content that no tag `vN` names.
        tags: those that point to it, without `vN`.
        method, base: as its manifest says; `base` is None for an adapter whose base model is not known.
        size: bytes of the adapter's files.
    """

    name: str
    version: int | None
    digest: str
    tags: tuple[str, ...]
    method: str
    base: str | None
    size: int

    @property
    def reference(self) -> str:
        """`name@vN`, or by digest."""
        return f"{self.name}@{f'v{self.version}' if self.version is not None else self.digest}"

    @property
    def metrics(self) -> Mapping[str, float]:
        """None: they are in `adapter.json`, which is not fetched."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"reference": self.reference, **asdict(self), "tags": list(self.tags)}


def versions(source: Source, name: str) -> Iterator[RemoteVersion]:
    """The adapters of one name, by number; what else is in the repository, such as container images, is left out.

    Raises:
        StoreError: when the remote cannot be asked, or answers with something else than it should.
    """
    tags = source.tags(name)
    by_digest: dict[str, list[str]] = {}
    for tag in tags:
        by_digest.setdefault(tags[tag].digest, []).append(tag)
    found = []
    for digest, pointing in by_digest.items():
        place = where(source, name, digest)
        document = load_json(source.manifest(name, digest), place)
        if not isinstance(document, dict) or document.get("artifactType") != ARTIFACT_TYPE:
            continue
        image = ImageManifest.parse_data(document, place)
        named = tuple(sorted(tag for tag in pointing if version_number(tag) is None))
        size = image.config.size + sum(each.size for each in image.layers)
        facts = (named, image.annotations.get(METHOD, "unknown"), image.annotations.get(BASE), size)
        found += [RemoteVersion(name, number, digest, *facts) for number in numbers(pointing) or (None,)]
    yield from sorted(found, key=lambda each: (each.version is None, each.version or 0))


def look(address: Address, plain_http: bool = False, chosen: Filter = _ALL) -> list[RemoteVersion]:
    """What is at an address: the adapters below it, and the one that it names itself.

    Args:
        chosen: only what it takes.

    Raises:
        UnknownReferenceError: when there is none. StoreError: when the remote cannot be asked.
    """
    found: list[RemoteVersion] = []
    refused: StoreError | None = None
    if address.scheme == "oci" and address.path:
        prefix, reference = locate(str(address))
        found += versions(_source(prefix, plain_http), reference.name)
    source = _source(address, plain_http)
    try:
        for name in filter(chosen.takes_name, source.names()):
            found += versions(source, name)
    except UnreachableError:
        raise
    except StoreError as error:
        refused = error
    if not found:
        raise refused or UnknownReferenceError(f"{address}: there are no adapters here")
    return [each for each in found if chosen.takes(each)]


def _source(address: Address, plain_http: bool) -> Source:
    found = connect(address, plain_http)
    return Folder(found) if isinstance(found, Store) else found
