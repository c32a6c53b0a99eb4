"""`reft doctor`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from reft_plugins.diagnosis import Finding
from reft_plugins.plugins import manager

_MARKS = {"ok": "ok", "missing": "-", "broken": "BROKEN"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Check this machine: libraries, runtimes, the store. Exits with 1 if something is broken.

    Every line that is not ok says what to do.

    Example: reft doctor --json
    """
    findings: list[Finding] = []
    for implementation in reversed(manager().hook.reft_diagnose.get_hookimpls()):
        name = implementation.plugin_name
        try:
            implementation.function(findings.append)
        except Exception as error:
            todo = "repair or uninstall the distribution that brings this plugin"
            findings.append(Finding(name, "broken", f"its check failed: {type(error).__name__}: {error}", todo))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            todo = f" -> {finding.todo}" if finding.todo else ""
            click.echo(f"{_MARKS[finding.status]:7}{finding.name:18}{finding.detail}{todo}")
    if any(finding.status == "broken" for finding in findings):
        sys.exit(1)
