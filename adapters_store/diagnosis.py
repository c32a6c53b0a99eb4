"""What `reft doctor` says about the store: its configuration, folder, remotes and policy."""

from __future__ import annotations

import math
from importlib import import_module

from adapters_store.configuration import Configuration, configuration, location
from adapters_store.location import VARIABLE, default_path, is_store
from adapters_store.wording import counted
from reft_plugins.diagnosis import Finding, Report
from reft_plugins.errors import StoreError


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
    report(_policy())


def _policy() -> Finding:
    from adapters_store.trust.policy import active

    try:
        policy = active()
        if policy is not None and any(rule.keys for rule in policy.rules):
            import_module("adapters_store.trust.bundles")  # which says what is missing to check signatures
    except StoreError as error:
        return Finding("trust policy", "broken", str(error), "repair it: until then adapters of the store are refused")
    if policy is None:
        return Finding("trust policy", "ok", "none: unsigned adapters are accepted")
    others = "refused" if policy.default.verdict == "refuse" else "accepted"
    return Finding(
        "trust policy", "ok", f"{policy.path}: {counted(len(policy.rules), 'rule')}; other names are {others}"
    )


def _remotes(found: Configuration) -> str:
    if not found.remotes:
        return "none: no network is used unless a command names a remote"
    again = {math.inf: "never again", 0.0: "at every use"}.get(found.refresh, f"every {found.refresh:g} s")
    return f"{', '.join(found.remotes)}; tags are looked up there {again}"
