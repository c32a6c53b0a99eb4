"""Certificates of exports that are attached to a version, as sections with tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapters_store.layout.attachments import Attachment
from adapters_store.layout.oci import CERTIFICATE_TYPE
from adapters_store.limits import MAX_SHOWN_CERTIFICATE_BYTES
from adapters_store.store import Store
from reft_plugins.errors import ReftError, StoreError, UnknownReferenceError

if TYPE_CHECKING:
    from reft_plugins.fidelity.certificate import Certificate
    from reft_plugins.fidelity.report import Section

CERTIFICATE_NAME = "certificate.json"
MAX_CERTIFICATES = 20
"""On one page, the newest first."""


@dataclass(frozen=True, slots=True)
class Report:
    """One certificate for people.

    Attributes:
        digest: of the attachment.
        error: why it cannot be shown; then there is nothing else.
        verdict: the result in two sentences.
        foreign: it says that it is of another adapter than the one it is attached to.
    """

    digest: str
    created: str | None
    error: str = ""
    title: str = ""
    verdict: str = ""
    foreign: bool = False
    sections: tuple[Section, ...] = ()


def reports(store: Store, reference: str) -> tuple[Report, ...]:
    """Every certificate of a version, also those that cannot be read.

    Raises:
        UnknownReferenceError: there is no such version. StoreError: what the store holds of it is damaged.
    """
    adapter = store.show(reference).image_manifest["config"]["digest"]
    return tuple(_report(store, each, adapter) for each in _newest(store, reference))


def picture(store: Store, reference: str, digest: str, number: int) -> str:
    """The SVG of one section of one certificate.

    Raises:
        UnknownReferenceError: there is no such version, certificate or picture.
    """
    for attachment in _newest(store, reference):
        if attachment.descriptor.digest == digest:
            sections = _read(_text(store, attachment), digest)[1]
            if 0 <= number < len(sections) and sections[number].picture:
                return sections[number].picture
    raise UnknownReferenceError(f"{reference}: no picture {number} of a certificate {digest}")


def documents(store: Store, reference: str) -> list[dict[str, Any]]:
    """Every certificate that can be read, for JSON."""
    found = []
    for attachment in _newest(store, reference):
        facts: dict[str, Any] = attachment.to_dict()
        try:
            facts["certificate"] = _read(_text(store, attachment), "")[0].model_dump(mode="json", by_alias=True)
        except ReftError as error:
            facts["error"] = str(error)
        found.append(facts)
    return found


def _newest(store: Store, reference: str) -> list[Attachment]:
    found = store.attachments(reference, CERTIFICATE_TYPE)
    return sorted(found, key=lambda each: each.created or "", reverse=True)[:MAX_CERTIFICATES]


def _report(store: Store, attachment: Attachment, adapter: str) -> Report:
    digest, created = attachment.descriptor.digest, attachment.created
    try:
        certificate, sections = _read(_text(store, attachment), digest)
    except ReftError as error:
        return Report(digest, created, error=str(error))
    from reft_plugins.fidelity.report import verdict

    return Report(
        digest,
        created,
        title=f"{certificate.adapter.reference} for {certificate.exported_to}",
        verdict=verdict(certificate),
        foreign=certificate.adapter.digest != adapter,
        sections=sections,
    )


def _text(store: Store, attachment: Attachment) -> bytes:
    if CERTIFICATE_NAME not in attachment.files:
        raise StoreError(f"attachment {attachment.descriptor.digest}: has no {CERTIFICATE_NAME}")
    return store.blobs.read(attachment.files[CERTIFICATE_NAME], MAX_SHOWN_CERTIFICATE_BYTES)


@lru_cache(maxsize=16)
def _read(text: bytes, where: str) -> tuple[Certificate, tuple[Section, ...]]:
    try:
        from reft_plugins.fidelity.certificate import parse_certificate
        from reft_plugins.fidelity.plots import draw
        from reft_plugins.fidelity.report import sections
    except ImportError as error:
        raise StoreError(f"certificates are read with PyTorch ({error}). pip install 'reft-plugins[train]'") from None
    certificate = parse_certificate(text, f"certificate {where}")
    try:
        pictures = draw(certificate)
    except (ArithmeticError, ValueError):  # numbers that were never measured, such as 1e308
        pictures = {}
    return certificate, tuple(sections(certificate, pictures))
