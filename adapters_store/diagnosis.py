"""What `reft doctor` says about the store: its configuration, folder, remotes and policy."""

from __future__ import annotations

import math
import os

from adapters_store.configuration import Configuration, configuration, location
from adapters_store.location import VARIABLE, default_path, is_store
from reft_plugins.diagnosis import Finding, Report
from reft_plugins.errors import StoreError

POLICY_VARIABLE = "REFT_POLICY"


def diagnose(report: Report) -> None:
    """Report what is in force. Nothing is asked over the network."""
    try:
        found = configuration()
    except StoreError as error:
        report(Finding("configuration", "broken", str(error), f"correct or remove {location()}"))
        return
    report(Finding("configuration", "ok", str(found.file) if found.file else f"none; would be {location()}"))
    path = default_path()
    if is_store(path):
        report(Finding("store", "ok", str(path)))
    else:
        report(
            Finding("store", "missing", f"none at {path}", f"reft store init, or set {VARIABLE} to a store's folder")
        )
    report(Finding("store remotes", "ok", _remotes(found)))
    policy = os.environ.get(POLICY_VARIABLE) or found.policy
    if policy is None:
        report(Finding("trust policy", "ok", "none: unsigned adapters are accepted"))
    elif os.path.isfile(policy):
        report(Finding("trust policy", "ok", str(policy)))
    else:
        todo = "write it, or every adapter of the store is refused"
        report(Finding("trust policy", "broken", f"{policy}: there is no such file", todo))


def _remotes(found: Configuration) -> str:
    if not found.remotes:
        return "none: no network is used unless a command names a remote"
    again = {math.inf: "never again", 0.0: "at every use"}.get(found.refresh, f"every {found.refresh:g} s")
    return f"{', '.join(found.remotes)}; tags are looked up there {again}"
