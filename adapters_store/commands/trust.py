"""Commands about who vouches for a version."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import open_store, optional_reference, reference, store_options
from adapters_store.wording import counted

PASSWORD = "REFT_KEY_PASSWORD"
_password = click.option(
    "--password", "ask", is_flag=True, help=f"Ask for a password of the private key; or set {PASSWORD}."
)


@click.command("keygen", short_help="Make a key pair to sign with.")
@click.argument("out", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@_password
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def keygen(out: Path, ask: bool, as_json: bool) -> None:
    """Make a key pair to sign with: OUT, which only you read, and beside it the public key, with the suffix .pub.

    Example: reft store keygen release.pem
    """
    from adapters_store.trust.keys import generate, read_public_keys

    private, public = generate(out, _secret(ask, confirm=True))
    (key,) = read_public_keys([public])
    if as_json:
        click.echo(json.dumps({"private": str(private), "public": str(public), "id": key.id}, indent=2))
        return
    click.echo(f"private key: {private} (keep it to yourself)\npublic key:  {public} (give it to whoever verifies)")


@click.command("sign", short_help="Sign one version.")
@click.argument("ref", metavar="REF", callback=reference, shell_complete=references)
@click.option("--key", required=True, type=click.Path(exists=True, path_type=Path), help="Private key, a PEM file.")
@_password
@store_options
def sign(ref: str, key: Path, ask: bool, path: Path | None, as_json: bool) -> None:
    """Sign one version; the signature is attached to it and travels with it.

    The key is one on the curves P-256, P-384 or P-521. Nothing asks the network.

    Example: reft store sign sentiment@v3 --key release.pem
    """
    from adapters_store.trust import signing

    store = open_store(path)
    made = signing.sign(store, ref, key, _secret(ask, confirm=False))
    record = store.find(f"{ref.partition('@')[0].partition(':')[0]}@{made.subject}")
    if as_json:
        click.echo(json.dumps({"reference": record.reference, **made.to_dict()}, indent=2))
        return
    click.echo(f"signed {record.reference}  {made.descriptor.digest}")


@click.group("policy", short_help="Ask the trust policy.", invoke_without_command=False)
def policy() -> None:
    """The trust policy: which versions runtimes may use. REFT_POLICY names its file, or policy in [trust] of the
    configuration file.

    Example: reft store policy check sentiment:prod
    """


@policy.command("check", short_help="Say whether the policy admits versions, and why not.")
@click.argument("ref", metavar="[REF]", required=False, callback=optional_reference, shell_complete=references)
@store_options
def check(ref: str | None, path: Path | None, as_json: bool) -> None:
    """Say of one version, or of all, whether the policy admits it, and why not; exit with 1 if it does not.

    Example: reft store policy check sentiment:prod
    """
    from adapters_store.trust.admission import decisions
    from adapters_store.trust.policy import active

    found = active()
    store = open_store(path)
    decided = list(decisions(store, found, ref))
    if as_json:
        facts = None if found is None else {"path": str(found.path), "digest": found.digest}
        click.echo(json.dumps({"policy": facts, "versions": [each.to_dict() for each in decided]}, indent=2))
    else:
        from adapters_store.commands.tables import printable

        for each in decided:
            click.echo(f"{each.reference}: {printable(each.explain())}")
        held = (
            f"policy {found.path}" if found else "no policy: set REFT_POLICY, or policy in [trust] of the configuration"
        )
        refused = sum(not each.admitted for each in decided)
        admitted = counted(len(decided) - refused, "version")
        click.echo(f"{admitted} admitted, {refused} refused by {held}" if found else held)
    sys.exit(0 if all(each.admitted for each in decided) else 1)


def _secret(ask: bool, confirm: bool) -> str | None:
    if ask:
        return str(click.prompt("Password of the private key", hide_input=True, confirmation_prompt=confirm, err=True))
    return os.environ.get(PASSWORD) or None


COMMANDS = (keygen, sign, policy)
