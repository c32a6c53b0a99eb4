"""Commands that use a version, to be copied."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reft_plugins.manifest import Manifest

_PLAIN = re.compile(r"[\w./][\w./-]{0,199}", re.ASCII)
"""A base model's name that is one word for a shell and no option for a program."""


@dataclass(frozen=True, slots=True)
class Use:
    """A command line, and what it is for."""

    purpose: str
    command: str


def uses(reference: str, name: str, manifest: Manifest) -> tuple[Use, ...]:
    """How to run, export and copy a version.

    Args:
        reference: of the version.
        name: of the adapter.
    """
    named = manifest.base is not None and _PLAIN.fullmatch(manifest.base.name)
    base = manifest.base.name if manifest.base is not None and named else "BASE"
    model = name.rsplit("/", maxsplit=1)[-1]
    return (
        Use("Generate text with transformers", f'reft generate {base} --adapter {reference} --prompt "…"'),
        Use("Serve it with vLLM", f"reft serve {base} --adapter {model}={reference}"),
        Use("Make an Ollama model", f"reft export ollama {reference} --base {base} --out {model} --create {model}"),
        Use("Get its files", f"reft store checkout {reference}"),
    )
