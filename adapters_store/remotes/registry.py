"""An OCI registry as a remote: each name is the repository `prefix/name`.

Source: OCI distribution specification 1.1. Registries without its referrers API get the tags that its "Referrers Tag
Schema" describes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import requests

from adapters_store.layout.oci import INDEX_TYPE, MANIFEST_TYPE, MAX_MANIFEST_BYTES, Descriptor, load_json
from adapters_store.references import Reference
from adapters_store.remotes import listings
from adapters_store.remotes.address import Address
from adapters_store.remotes.client import Client, refusal, unreachable
from adapters_store.remotes.download import Download
from adapters_store.remotes.remote import LazyTags, Progress
from adapters_store.remotes.session import Patience
from adapters_store.remotes.upload import CHUNK, Upload
from reft_plugins.errors import StoreError
from reft_plugins.manifest import sha256

REFERRERS_TAG = re.compile(r"sha256-[0-9a-f]{64}")
_MANIFEST_TYPES = (
    MANIFEST_TYPE,
    INDEX_TYPE,
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_ACCEPT = {"Accept": ", ".join(_MANIFEST_TYPES)}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ATTEMPTS = 5


class Registry:
    """An OCI registry, which satisfies `Remote`.

    Args:
        address: of the registry; names are below its path.
        plain_http: talk without encryption; to this machine itself that is always done.
        patience: how long answers may take.
        chunk: bytes of a piece of an upload.
    """

    def __init__(
        self, address: Address, plain_http: bool = False, patience: Patience | None = None, chunk: int = CHUNK
    ) -> None:
        self._address = address
        self._client = Client(address, plain_http, patience or Patience())
        self._chunk = chunk

    @property
    def address(self) -> str:
        """`oci://host/prefix`."""
        return str(self._address)

    def names(self) -> Sequence[str]:
        """Every repository below the prefix whose name a store accepts.

        Raises:
            StoreError: also where the registry does not list repositories, as many public ones do not.
        """
        prefix = f"{self._address.path}/" if self._address.path else ""
        with _explained(self.address, "list its repositories"):
            found = listings.repositories(self._client, self.address)
        names = {each.removeprefix(prefix) for each in found if each.startswith(prefix)}
        return sorted(each for each in names if (parsed := Reference.try_parse(each)) is not None and not parsed.exact)

    def tags(self, name: str) -> Mapping[str, Descriptor]:
        """See `Remote`."""
        with _explained(self._where(name), "list its tags"):
            found = listings.tags(self._client, self._repository(name), self._where(name))
        kept = [tag for tag in found if not REFERRERS_TAG.fullmatch(tag)]
        return LazyTags(kept, lambda tag: self.descriptor(name, tag))

    def descriptor(self, name: str, reference: str) -> Descriptor | None:
        """See `Remote`."""
        where = self._where(name, reference)
        with _explained(where, "look up a manifest"):
            response = self._client.do_request(self._manifest_url(name, reference), "HEAD", headers=dict(_ACCEPT))
        if response.status_code == 404:
            return None
        if response.status_code != 200:
            raise refusal(where, "look up a manifest", response)
        digest, size = response.headers.get("Docker-Content-Digest", ""), response.headers.get("Content-Length", "")
        if not _DIGEST.fullmatch(digest) or not re.fullmatch("[0-9]{1,10}", size):
            data, media_type = self._fetch(name, reference)
            return Descriptor(mediaType=media_type, digest=sha256(data), size=len(data))
        if _DIGEST.fullmatch(reference) and digest != reference:
            raise StoreError(f"{where}: the registry answers with another digest, {digest}. Tell its owner")
        return Descriptor(mediaType=listings.media_type(response), digest=digest, size=int(size))

    def manifest(self, name: str, reference: str) -> bytes:
        """See `Remote`."""
        return self._fetch(name, reference)[0]

    def has_blob(self, name: str, descriptor: Descriptor) -> bool:
        """See `Remote`."""
        with _explained(self._where(name), "look for a blob"):
            response = self._client.do_request(self._blob_url(name, descriptor), "HEAD")
        if response.status_code not in (200, 404):
            raise refusal(self._where(name), "look for a blob", response)
        return response.status_code == 200

    def push_blob(self, name: str, descriptor: Descriptor, path: Path, progress: Progress) -> None:
        """See `Remote`."""
        where = self._where(name)
        url = f"{self._client.root}{self._repository(name)}/blobs/uploads/"
        with _explained(where, "upload a blob"):
            Upload(self._client, where, url, self._chunk).send(descriptor, path, progress)

    def pull_blob(self, name: str, descriptor: Descriptor, target: BinaryIO, progress: Progress) -> None:
        """See `Remote`."""
        where = self._where(name)
        with _explained(where, "download a blob"):
            Download(self._client, where, self._blob_url(name, descriptor)).receive(descriptor, target, progress)

    def push_manifest(self, name: str, reference: str, descriptor: Descriptor, data: bytes) -> None:
        """See `Remote`."""
        self._put(name, reference, descriptor.media_type, data)

    def referrers(self, name: str, digest: str) -> Sequence[Descriptor]:
        """See `Remote`."""
        where = self._where(name, digest)
        with _explained(where, "list what refers to a manifest"):
            found = listings.referrers(self._client, self._repository(name), _checked(digest), where)
        return self._tagged_referrers(name, digest) if found is None else found

    def push_referrer(self, name: str, subject: str, descriptor: Descriptor, data: bytes) -> None:
        """See `Remote`."""
        response = self._put(name, descriptor.digest, descriptor.media_type, data)
        if response.headers.get("OCI-Subject") == subject:
            return
        tag = _checked(subject).replace(":", "-")
        for _ in range(_ATTEMPTS):
            known = self._tagged_referrers(name, subject)
            if any(each.digest == descriptor.digest for each in known):
                return
            manifests = [each.to_data() for each in (*known, descriptor)]
            index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}
            self._put(name, tag, INDEX_TYPE, json.dumps(index, sort_keys=True).encode())
        raise StoreError(f"{self._where(name, tag)}: others keep writing this tag at the same time. Try again")

    def _tagged_referrers(self, name: str, digest: str) -> list[Descriptor]:
        tag = _checked(digest).replace(":", "-")
        if self.descriptor(name, tag) is None:
            return []
        where = self._where(name, tag)
        data, media_type = self._fetch(name, tag)
        if media_type != INDEX_TYPE:
            raise StoreError(f"{where}: is {media_type!r} where an index of referrers is due")
        return listings.descriptors(load_json(data, where), where)

    def _fetch(self, name: str, reference: str) -> tuple[bytes, str]:
        where = self._where(name, reference)
        with _explained(where, "read a manifest"):
            response = self._client.do_request(self._manifest_url(name, reference), headers=dict(_ACCEPT))
        if response.status_code != 200:
            raise refusal(where, "hand out a manifest", response)
        media_type, data = listings.media_type(response), response.content
        if media_type not in _MANIFEST_TYPES:
            raise StoreError(f"{where}: answers with {media_type!r}, so it is no registry, or there is one behind it")
        if len(data) > MAX_MANIFEST_BYTES:
            raise StoreError(f"{where}: a manifest of {len(data)} bytes exceeds the limit of {MAX_MANIFEST_BYTES}")
        if _DIGEST.fullmatch(reference) and sha256(data) != reference:
            raise StoreError(f"{where}: the registry's answer has another digest, {sha256(data)}. Tell its owner")
        return data, media_type

    def _put(self, name: str, reference: str, media_type: str, data: bytes) -> requests.Response:
        where = self._where(name, reference)
        with _explained(where, "write a manifest"):
            url = self._manifest_url(name, reference)
            response = self._client.do_request(url, "PUT", data, {"Content-Type": media_type})
        if response.status_code != 201:
            raise refusal(where, "take a manifest", response)
        stored = response.headers.get("Docker-Content-Digest", sha256(data))
        if stored != sha256(data):
            raise StoreError(f"{where}: the registry stored other bytes than it was sent ({stored}). Tell its owner")
        return response

    def _repository(self, name: str) -> str:
        return "/".join(filter(None, (self._address.path, name)))

    def _where(self, name: str, reference: str = "") -> str:
        mark = "@" if _DIGEST.fullmatch(reference) else ":"
        return f"{self.address}/{name}{mark if reference else ''}{reference}"

    def _manifest_url(self, name: str, reference: str) -> str:
        return f"{self._client.root}{self._repository(name)}/manifests/{reference}"

    def _blob_url(self, name: str, descriptor: Descriptor) -> str:
        return f"{self._client.root}{self._repository(name)}/blobs/{_checked(descriptor.digest)}"


def _checked(digest: str) -> str:
    if _DIGEST.fullmatch(digest) is None:
        raise StoreError(f"{digest[:100]!r}: not a SHA-256 digest, which is the only kind of this store")
    return digest


@contextmanager
def _explained(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except requests.RequestException as error:
        raise unreachable(where, what, error) from None
