"""Commands that move versions between stores and remotes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.filesize import decimal

from adapters_store.commands.completion import references as complete
from adapters_store.commands.options import BOTH, NEITHER, Function, open_store, plain_name, references, store_options
from adapters_store.references import Reference
from adapters_store.remotes.address import Address, locate
from adapters_store.wording import counted
from reft_plugins.errors import ReftError, StoreError

if TYPE_CHECKING:
    from adapters_store.filters import Filter
    from adapters_store.remotes.transfer import Moved, Transfer, Watch

_ALL = click.option("--all", "everything", is_flag=True, help="All versions and tags of all names.")


def transfer_options(function: Function) -> Function:
    """What push, pull and copy have in common."""
    for option in (
        click.option("--as", "name", metavar="NAME", callback=plain_name, help="Another name at the target."),
        click.option("--renumber", is_flag=True, help="Versions whose numbers are taken get the next free ones."),
        click.option("--plain-http", is_flag=True, help="Talk to the registry without encryption."),
    ):
        function = option(function)
    return store_options(function)


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except StoreError as error:
        raise click.BadParameter(str(error)) from None


def _target(ctx: click.Context, param: click.Parameter, value: str) -> Address:
    return _address(value)


def _sent(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if "://" in value:
            raise click.BadParameter(f"{value!r} is an address. REMOTE comes last, behind the references")
    return references(ctx, param, values)


@click.command("push", short_help="Send versions to a remote.")
@click.argument("refs", metavar="[REF]...", nargs=-1, callback=_sent, shell_complete=complete)
@click.argument("address", metavar="REMOTE", callback=_target)
@_ALL
@transfer_options
def push(
    refs: tuple[str, ...],
    address: Address,
    everything: bool,
    name: str | None,
    renumber: bool,
    plain_http: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """Send versions to REMOTE with their tags, signatures and certificates; what it has is not sent again.

    NAME:TAG sends that version and that tag, NAME@vN that version, NAME all versions and tags. REMOTE is
    oci://HOST/PREFIX for any OCI registry (docker's login is used), hf://ORG/REPO for the Hugging Face Hub, or the
    folder of another store. Version N becomes the tag vN there and never moves; other tags move.

    Example: reft store push sentiment:prod oci://registry.example/team
    """
    _check_chosen(refs, everything, name)
    from adapters_store.remotes.transfer import connect
    from adapters_store.remotes.transfer import push as send

    store, target = open_store(path), connect(address, plain_http)
    chosen = store.names() if everything else refs
    _run(chosen, "sending", "sent", as_json, lambda each, watch: send(store, each, target, name, renumber, watch))


@click.command("pull", short_help="Fetch versions from a remote.")
@click.argument("remote", metavar="REMOTE")
@click.argument("refs", metavar="[REF]...", nargs=-1, callback=references)
@_ALL
@transfer_options
def pull(
    remote: str,
    refs: tuple[str, ...],
    everything: bool,
    name: str | None,
    renumber: bool,
    plain_http: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """Fetch versions from REMOTE with their tags, signatures and certificates; what is here is not fetched again.

    Without REF, the last part of REMOTE is the reference. A version keeps its number; one that is other content here
    is refused, and everything else arrives: choose between --as and --renumber then.

    Example: reft store pull oci://registry.example/team/sentiment:prod
    """
    address, refs = _located(remote, refs, everything, name)
    from adapters_store.remotes.transfer import connect, names_of
    from adapters_store.remotes.transfer import pull as fetch

    store, source = open_store(path), connect(address, plain_http)
    chosen = names_of(source) if everything else refs
    _run(chosen, "fetching", "fetched", as_json, lambda each, watch: fetch(source, each, store, name, renumber, watch))


@click.command("copy", short_help="Send versions from one remote to another.")
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET", callback=_target)
@click.argument("refs", metavar="[REF]...", nargs=-1, callback=references)
@_ALL
@transfer_options
def copy(
    source: str,
    target: Address,
    refs: tuple[str, ...],
    everything: bool,
    name: str | None,
    renumber: bool,
    plain_http: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """Send versions from SOURCE to TARGET, each a registry, a repository of the Hub or a store's folder.

    Without REF, the last part of SOURCE is the reference. The store of --store has no part in it.

    \b
    Example: reft store copy oci://registry.example/dev oci://registry.example/prod sentiment:v3
    """
    address, refs = _located(source, refs, everything, name)
    from adapters_store.remotes.transfer import connect, names_of
    from adapters_store.remotes.transfer import copy as carry

    origin, end = connect(address, plain_http), connect(target, plain_http)
    chosen = names_of(origin) if everything else refs
    _run(chosen, "copying", "copied", as_json, lambda each, watch: carry(origin, each, end, name, renumber, watch))


def is_remote(text: str) -> bool:
    """Whether what `ls` was given is an address and not a name: it has a scheme or a port, or is written as a path."""
    return ":" in text or text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def list_remote(text: str, chosen: Filter, plain_http: bool, as_json: bool) -> None:
    """What `ls` prints of a remote."""
    from adapters_store.commands.tables import print_records
    from adapters_store.remotes.catalog import look

    found = look(_address(text), plain_http, chosen)
    if as_json:
        click.echo(json.dumps([each.to_dict() for each in found], indent=2))
        return
    print_records(found)


def _check_chosen(refs: Sequence[str], everything: bool, name: str | None) -> None:
    if everything == bool(refs):
        raise click.UsageError(BOTH if refs else NEITHER)
    if name is not None and (everything or len({Reference.parse(each).name for each in refs}) > 1):
        raise click.UsageError("--as needs versions of a single name")


def _located(text: str, refs: tuple[str, ...], everything: bool, name: str | None) -> tuple[Address, tuple[str, ...]]:
    try:
        if refs or everything:
            address = Address.parse(text)
        else:
            address, reference = locate(text)
            refs = (str(reference),)
    except StoreError as error:
        if Reference.try_parse(text) is not None:
            raise click.UsageError(
                f"{text!r} says no remote. Write it in front, as in oci://HOST/PREFIX {text}"
            ) from None
        raise click.BadParameter(str(error)) from None
    _check_chosen(refs, everything, name)
    return address, refs


def _run(chosen: Sequence[str], doing: str, done: str, as_json: bool, move: Callable[[str, Watch], Transfer]) -> None:
    """One transfer per reference; what is refused does not keep the others from moving, and is an error at the end."""
    from adapters_store.commands.tables import progress_bar
    from adapters_store.remotes.remote import UnreachableError
    from adapters_store.remotes.transfer import IncompleteTransferError

    transfers: list[Transfer] = []
    errors: list[ReftError] = []
    for each in chosen:
        try:
            with progress_bar(f"{doing} {each}") as watch:
                transfers.append(move(each, watch))
        except IncompleteTransferError as error:
            transfers.append(error.transfer)
            errors += error.errors
        except ReftError as error:
            errors.append(error)
            if isinstance(error, UnreachableError):
                break
    if as_json:
        failed = [{"error": str(error), "kind": type(error).__name__} for error in errors]
        click.echo(json.dumps({"transfers": [each.to_dict() for each in transfers], "errors": failed}, indent=2))
    else:
        for transfer in transfers:
            _print(transfer, done)
    if len(errors) > 1:
        raise StoreError("; ".join(map(str, errors)))
    if errors:
        raise errors[0]


def _print(transfer: Transfer, done: str) -> None:
    for each in transfer.versions:
        click.echo(f"{done if each.new else 'already there:'} {each.reference}  {each.digest}{_tags(each)}")
    for sentence in transfer.skipped:
        click.echo(f"reft: warning: {sentence}", err=True)
    new = sum(each.new for each in transfer.versions)
    click.echo(
        f"{transfer.target}: {counted(len(transfer.versions), 'version')}, {new} new, {decimal(transfer.bytes)} {done}"
    )


def _tags(moved: Moved) -> str:
    tags = [f"{tag}, before {moved.replaced[tag]}" if tag in moved.replaced else tag for tag in moved.tags]
    attached = [counted(len(moved.attachments), "attachment")] if moved.attachments else []
    return f"  ({'; '.join([*tags, *attached])})" if tags or attached else ""


COMMANDS = (
    push,
    pull,
    copy,
)
