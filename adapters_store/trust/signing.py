"""Signatures of versions: attached to them as OCI referrers, so they travel with them through any registry.

A signature binds content, not a name: it stays valid when a version is pushed, pulled, copied or tagged, and it holds
for the same content under any other name. Names that must not stand in for each other need keys of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adapters_store.layout.contents import unpack
from adapters_store.layout.oci import SIGNATURE_TYPE
from adapters_store.limits import MAX_SIGNATURE_BYTES, MAX_SIGNATURES
from adapters_store.trust.keys import PublicKey, distinct
from reft_plugins.errors import ReftError, StoreError

if TYPE_CHECKING:
    from adapters_store.layout.attachments import Attachment
    from adapters_store.store import Store
    from adapters_store.verbs.reading import Reading

SIGNATURE_FILE: Final = "signature.json"


@dataclass(frozen=True, slots=True)
class Checked:
    """One signature of a version: `key` made it and it holds, or `problem` says why it does not count."""

    digest: str
    key: PublicKey | None
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        key = None if self.key is None else {"id": self.key.id, "label": self.key.label}
        return {"digest": self.digest, "key": key, "problem": self.problem}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who signed a version, as far as some keys tell.

    Attributes:
        reference: the version.
        digest: of its image manifest.
        signatures: those it carries, the oldest first.
        ignored: how many more it carries than `MAX_SIGNATURES`, which nobody looks at.
    """

    reference: str
    digest: str
    signatures: tuple[Checked, ...]
    ignored: int = 0

    @property
    def signers(self) -> tuple[PublicKey, ...]:
        """The keys whose signatures hold, each once."""
        return distinct(each.key for each in self.signatures if each.key is not None)

    @property
    def ok(self) -> bool:
        """True when at least one of the keys signed it."""
        return bool(self.signers)

    def explain(self) -> str:
        """What the signatures are worth, in one line."""
        if self.ok:
            return f"signed by {', '.join(map(str, self.signers))}"
        if not self.signatures:
            return "carries no signature"
        more = (f"{self.ignored} more than {MAX_SIGNATURES} were not looked at",) if self.ignored else ()
        return "; ".join((*(f"signature {each.digest[:19]}: {each.problem}" for each in self.signatures), *more))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reference": self.reference,
            "digest": self.digest,
            "ok": self.ok,
            "signatures": [each.to_dict() for each in self.signatures],
            "ignored": self.ignored,
        }


def sign(store: Store, reference: str, private_key: Path | str, password: str | None = None) -> Attachment:
    """Sign a version and attach the signature to it. Every byte of the version is verified first.

    Args:
        private_key: PEM file of a private key on P-256, P-384 or P-521; password: where it is encrypted.

    Raises:
        UnknownReferenceError: listing what exists.
        StoreError: when the version is damaged or has more signatures than anybody reads, the key cannot be used, or
            the store cannot be written.
    """
    from adapters_store.trust.bundles import BUNDLE_TYPE, make

    record = store.find(reference)
    exact = f"{record.name}@{record.digest}"
    if len(signatures(store, exact)) >= MAX_SIGNATURES:
        raise StoreError(
            f"{record.reference}: carries {MAX_SIGNATURES} signatures, and nobody looks at one more. Remove the "
            "version and add it again, which leaves them behind"
        )
    bundle = make(sound_files(store, exact), record.reference, Path(private_key), password)
    return store.attach(exact, SIGNATURE_TYPE, {SIGNATURE_FILE: (BUNDLE_TYPE, bundle)})


def verify(store: Reading, reference: str, keys: Iterable[PublicKey]) -> Verdict:
    """Which of some keys signed a version. Every byte of it is read and verified, from the blobs and no checkout.

    Raises:
        UnknownReferenceError: listing what exists.
        StoreError: when the version is damaged.
    """
    record = store.find(reference)
    exact = f"{record.name}@{record.digest}"
    return replace(judge(store, exact, sound_files(store, exact), keys), reference=record.reference)


def survey(store: Reading, keys: Iterable[PublicKey]) -> Iterator[Verdict]:
    """Who signed each version. Tensors are not read: `Store.verify` does that, for all of them at once.

    A version whose manifests are damaged has one signature that does not count, which says so.
    """
    keys = tuple(keys)
    for record in store.list():
        try:
            exact = f"{record.name}@{record.digest}"
            files = {name: each.digest for name, each in unpack(store.blobs, store.descriptor(exact)).files.items()}
            yield replace(judge(store, exact, files, keys), reference=record.reference)
        except ReftError as error:
            yield Verdict(record.reference, record.digest, (Checked(record.digest, None, str(error)),))


def judge(store: Reading, reference: str, files: Mapping[str, str], keys: Iterable[PublicKey]) -> Verdict:
    """Which of some keys signed these files, by the signatures attached to a version.

    Args:
        reference: `name@sha256:…`, which cannot come to mean another version meanwhile.
        files: digest by name, of the version's files.
    """
    keys = tuple(keys)
    found = signatures(store, reference)
    checked = tuple(_check(store, each, files, keys) for each in found[:MAX_SIGNATURES])
    return Verdict(reference, store.descriptor(reference).digest, checked, len(found) - len(checked))


def signatures(store: Reading, reference: str) -> tuple[Attachment, ...]:
    """The signatures a version carries, the oldest first, whatever they are worth."""
    return store.attachments(reference, SIGNATURE_TYPE)


def sound_files(store: Reading, reference: str) -> dict[str, str]:
    """Digest by name of a version's files, each of which was read and verified now.

    Raises:
        StoreError: naming a blob that is missing or damaged.
    """
    contents = unpack(store.blobs, store.descriptor(reference))
    for descriptor in contents.files.values():
        store.blobs.copy(descriptor, None)
    return {name: descriptor.digest for name, descriptor in contents.files.items()}


def _check(store: Reading, signature: Attachment, files: Mapping[str, str], keys: tuple[PublicKey, ...]) -> Checked:
    from adapters_store.trust.bundles import signer_of

    digest = signature.descriptor.digest
    try:
        if SIGNATURE_FILE not in signature.files:
            raise StoreError(f"holds no {SIGNATURE_FILE}")
        bundle = store.blobs.read(signature.files[SIGNATURE_FILE], MAX_SIGNATURE_BYTES)
        return Checked(digest, signer_of(bundle, files, keys), None)
    except StoreError as error:
        return Checked(digest, None, str(error))
