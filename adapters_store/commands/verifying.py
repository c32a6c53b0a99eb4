"""What `reft store verify` does and prints: soundness, and signatures where keys are given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapters_store.commands.tables import printable, progress_bar
from adapters_store.trust.keys import read_public_keys
from adapters_store.trust.signing import Verdict, signatures, sound_files, survey, verify
from adapters_store.wording import counted

if TYPE_CHECKING:
    from adapters_store.store import Store


def verify_store(store: Store, keys: Sequence[Path], as_json: bool) -> bool:
    """Everything in the store; with keys also that each version is signed. Returns whether nothing is wrong."""
    public = read_public_keys(keys)
    with progress_bar("verifying") as progress:
        report = store.verify(progress)
    verdicts = list(survey(store, public)) if keys and report.ok else []
    unsigned = [verdict for verdict in verdicts if not verdict.ok]
    ok = report.ok and not unsigned
    if as_json:
        signed = {"signatures": [verdict.to_dict() for verdict in verdicts]} if keys else {}
        click.echo(json.dumps({**report.to_dict(), "ok": ok, **signed}, indent=2))
        return ok
    for problem in report.problems:
        click.echo(printable(str(problem)))
    for verdict in unsigned:
        _print(verdict)
    what = counted(len(report.problems), "problem") if report.problems else "everything is sound"
    if report.problems and keys:
        what += "; signatures were not looked at"
    elif keys:
        what += f"; {counted(len(verdicts) - len(unsigned), 'version')} signed, {len(unsigned)} not"
    click.echo(
        f"{counted(report.versions, 'version')}, {counted(report.tags, 'tag')}, "
        f"{counted(report.blobs, 'sound blob')} of {counted(report.bytes, 'byte')}, "
        f"{report.unreferenced} of them unreferenced: {what}"
    )
    if report.problems:
        click.echo(
            "Adapters are repaired by adding them again from their files, or pulling them again; "
            "the index by `reft store recover`"
        )
    return ok


def verify_version(store: Store, reference: str, keys: Sequence[Path], as_json: bool) -> bool:
    """One version, every byte of it; with keys also that one of them signed it. Returns whether nothing is wrong."""
    if keys:
        verdict = verify(store, reference, read_public_keys(keys))
        if as_json:
            click.echo(json.dumps(verdict.to_dict(), indent=2))
        else:
            _print(verdict)
        return verdict.ok
    record = store.find(reference)
    exact = f"{record.name}@{record.digest}"
    files = sound_files(store, exact)
    carried = len(signatures(store, exact))
    if as_json:
        found = {"reference": record.reference, "digest": record.digest, "ok": True, "files": files}
        click.echo(json.dumps({**found, "signatures_not_checked": carried}, indent=2))
    else:
        hint = ", not checked: say whose with --key" if carried else ""
        click.echo(f"{record.reference}: sound; {counted(carried, 'signature')}{hint}")
    return True


def _print(verdict: Verdict) -> None:
    click.echo(f"{verdict.reference}: {'' if verdict.ok else 'not signed: '}{printable(verdict.explain())}")
