"""What the plugin puts into a model, from vLLM's `additional_config={"reft": {...}}`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from reft_plugins.errors import ReftError, UnsupportedProgramError
from reft_plugins.program import COMPONENTS, Node, Program, VirtualTokens, canonical

LINEARS, VIRTUAL_TOKENS, PREFIXES, GATED_PREFIXES = "linears", "virtual_tokens", "prefixes", "gated_prefixes"
SITES = (*COMPONENTS, LINEARS, VIRTUAL_TOKENS, PREFIXES, GATED_PREFIXES)
"""Everything that can be put into a model; each name costs a call per layer, so that only what is named is there."""

DEFAULT_SITES = frozenset({"block_output", VIRTUAL_TOKENS})


POOL_MIB, POOL_MIB_PER_SLOT = 256, 4


class SettingsError(ReftError):
    """`additional_config["reft"]` cannot be read."""


@dataclass(frozen=True, slots=True)
class Settings:
    """
    Attributes:
        sites: which of `SITES` are installed.
        pool_mib: on devices whose graphs forbid moving buffers, memory of the page pool per width, in MiB; by default
            `POOL_MIB_PER_SLOT` for each adapter that can be active, at least `POOL_MIB`.
        stages: on such devices, how many edits of one site may read each other's output.
    """

    sites: frozenset[str] = DEFAULT_SITES
    pool_mib: int | None = None
    stages: int = 4

    @classmethod
    def of(cls, additional_config: Any) -> Settings:
        """Read vLLM's additional configuration.

        Raises:
            SettingsError: naming the key that is unknown or has no meaning.
        """
        given = additional_config.get("reft", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise SettingsError(
                f'additional_config["reft"] must be an object such as {{"sites": "all"}}, not {given!r}'
            )
        if unknown := set(given) - {"sites", "pool_mib", "stages"}:
            raise SettingsError(f"unknown reft settings {sorted(unknown)}; known are sites, pool_mib, stages")
        values = dict(given)
        if "sites" in values:
            values["sites"] = named_sites(values["sites"])
        for name in ("pool_mib", "stages"):
            if name in values and (not isinstance(values[name], int) or values[name] < 1):
                raise SettingsError(f"reft setting {name} must be a whole number from 1, not {values[name]!r}")
        return cls(**values)

    def pool_bytes(self, slots: int) -> int:
        """Memory of the page pool per width, for so many adapters."""
        return (self.pool_mib or max(POOL_MIB, slots * POOL_MIB_PER_SLOT)) << 20

    def check(self, program: Program) -> None:
        """Refuse a program with a node that needs a site which is not installed.

        Raises:
            UnsupportedProgramError: naming the node and the setting.
        """
        for node, site in needed(program):
            if site not in self.sites:
                wanted = sorted({*self.sites, *(name for _, name in needed(program))})
                option = json.dumps({"reft": {"sites": wanted}})
                raise UnsupportedProgramError(
                    f"{node} needs the site {site!r}, which this engine was started without; start it with "
                    f"--sites {','.join(wanted)} (reft serve) or --additional-config '{option}' (vllm serve)"
                )


def named_sites(value: str | Collection[str]) -> frozenset[str]:
    """Names of sites from "all", "a,b" or a list.

    Raises:
        SettingsError: naming what is no site.
    """
    if value == "all":
        return frozenset(SITES)
    names = frozenset(value.split(",") if isinstance(value, str) else value)
    if unknown := names - set(SITES):
        raise SettingsError(f"no such sites: {', '.join(sorted(map(str, unknown)))}; there are {', '.join(SITES)}")
    return names


def needed(program: Program) -> list[tuple[Node, str]]:
    """The sites a program needs, each with the node that needs it."""
    from reft_vllm.lowering import by_linears

    found: list[tuple[Node, str]] = []
    for edit in program.edits:
        found.append((edit, edit.site.component))
        if edit.reads is not None and canonical(edit.reads) != canonical(edit.site.component):
            found.append((edit, edit.reads))
    found += [(delta, LINEARS) for delta in by_linears(program)]
    found += [(prefix, PREFIXES if prefix.gate is None else GATED_PREFIXES) for prefix in program.prefixes]
    found += [(node, VIRTUAL_TOKENS) for node in program if isinstance(node, VirtualTokens)]
    return found
