"""Commands for what refers to a version: certificates of exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import open_store, reference, store_options
from reft_plugins.errors import StoreError

if TYPE_CHECKING:
    from adapters_store.layout.attachments import Attachment
    from adapters_store.store import Store

CERTIFICATE_FILE = "certificate.json"


@click.command("attach", short_help="Attach the certificate of an export to a version.")
@click.argument("ref", metavar="REF", callback=reference, shell_complete=references)
@click.argument("file", metavar="FILE", type=click.Path(exists=True, path_type=Path))
@store_options
def attach(ref: str, file: Path, path: Path | None, as_json: bool) -> None:
    """Attach the certificate of an export (fidelity.json, or the folder that holds it) to the version it is about.

    It travels with the version when that is pushed, pulled, exported or imported.

    Example: reft store attach sentiment@v3 exported/fidelity.json
    """
    store = open_store(path)
    attachment = attach_certificate(store, ref, file)
    if as_json:
        click.echo(json.dumps({"reference": store.find(ref).reference, **attachment.to_dict()}, indent=2))
        return
    click.echo(f"attached to {store.find(ref).reference}: {attachment.artifact_type}  {attachment.descriptor.digest}")


def attach_certificate(store: Store, ref: str, file: Path) -> Attachment:
    """Check a certificate, and attach it.

    Raises:
        DataError: it is none. StoreError: it is about another adapter, or too large.
    """
    from adapters_store.layout.attachments import MAX_ATTACHED_BYTES
    from adapters_store.layout.files import explained
    from adapters_store.layout.oci import CERTIFICATE_TYPE
    from reft_plugins.fidelity.certificate import CERTIFICATE_FILE as EXPORTED
    from reft_plugins.fidelity.certificate import parse_certificate
    from reft_plugins.manifest import sha256

    file = file / EXPORTED if file.is_dir() else file
    with explained("read", file), file.open("rb") as opened:
        text = opened.read(MAX_ATTACHED_BYTES + 1)
    if len(text) > MAX_ATTACHED_BYTES:
        raise StoreError(f"{file}: larger than {MAX_ATTACHED_BYTES} bytes, the limit for attachments")
    certificate = parse_certificate(text, str(file))
    details = store.show(ref)
    wanted = sha256(details.manifest.to_json().encode())
    if certificate.adapter.digest != wanted:
        raise StoreError(
            f"{file}: is about {certificate.adapter.reference} ({certificate.adapter.digest}), "
            f"but {details.record.reference} is {wanted}. Attach it to the version that was exported"
        )
    files = {CERTIFICATE_FILE: ("application/json", text)}
    return store.attach(f"{details.record.name}@{details.record.digest}", CERTIFICATE_TYPE, files)


@click.command("attachments", short_help="List the signatures and certificates of a version.")
@click.argument("ref", metavar="REF", callback=reference, shell_complete=references)
@store_options
def attachments(ref: str, path: Path | None, as_json: bool) -> None:
    """List what is attached to a version: signatures, and certificates of exports.

    Example: reft store attachments sentiment@v3
    """
    found = open_store(path).attachments(ref)
    if as_json:
        click.echo(json.dumps([each.to_dict() for each in found], indent=2))
        return
    from adapters_store.commands.tables import print_columns

    rows = [(each.artifact_type, each.created or "", ", ".join(each.files), each.descriptor.digest) for each in found]
    print_columns(("TYPE", "CREATED", "FILES", "DIGEST"), rows)


COMMANDS = (attach, attachments)
