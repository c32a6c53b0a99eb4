"""`reft import`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reft_plugins.cli.common import key_values, refuse_existing

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter
    from reft_plugins.manifest import ProgramFacts

_FIRST = ("format", "found", "assumed")


@click.command("import")
@click.argument("source")
@click.option("--base", required=True, help="The base model it was trained on: folder or hub id.")
@click.option("--positions", help="Where it was trained, if its files do not say: f7+l7;cap=half, prompt, ….")
@click.option(
    "--option", "options", multiple=True, callback=key_values, help="What else is not in its files, KEY=VALUE."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(source: str, base: str, positions: str | None, options: dict[str, Any], out: Path, as_json: bool) -> None:
    """Write a checkpoint of another library as an adapter, and say what was found and what was assumed.

    Read are pyreft, PEFT, AdapterHub, LoRA-Dash, and the formats of plugins.

    Example: reft import CHECKPOINT --base BASE --positions "f7+l7;cap=half" --option activation=relu --out my-adapter
    """
    refuse_existing(out)
    from reft_plugins import load

    adapter = load(source, base=base, positions=positions, **options)
    adapter.save(out)
    if as_json:
        manifest = adapter.manifest
        found = {
            "out": str(out),
            "digest": adapter.digest,
            "method": manifest.method,
            "base": None if manifest.base is None else manifest.base.name,
            "does": _does(manifest.program),
            "given": {**({} if positions is None else {"positions": positions}), **options},
            "notes": manifest.notes,
        }
        click.echo(json.dumps(found, indent=2))
        return
    _print(adapter, positions, options, out)


def _print(adapter: Adapter, positions: str | None, options: dict[str, Any], out: Path) -> None:
    manifest, notes = adapter.manifest, adapter.manifest.notes
    rows = [(name, notes.get(name, "nothing" if name == "assumed" else "")) for name in _FIRST]
    rows += [
        ("given", f"{name}={value}") for name, value in {"positions": positions, **options}.items() if value is not None
    ]
    rows += [(name, text) for name, text in sorted(notes.items()) if name not in _FIRST]
    rows.append(("method", manifest.method))
    if manifest.base is not None:
        rows.append(("base", f"{manifest.base.name} ({manifest.base.architecture})"))
    rows += [("does", line) for line in _does(manifest.program)]
    for name, text in rows:
        if text:
            click.echo(f"{name:12} {text}")
    click.echo(f"saved to {out}")


def _does(facts: ProgramFacts) -> list[str]:
    """The program in a line for each kind of node."""
    lines = []
    edits = Counter((edit.component, edit.positions) for edit in facts.edits)
    for (component, positions), count in edits.items():
        layers = sorted(
            {edit.layer for edit in facts.edits if (edit.component, edit.positions) == (component, positions)}
        )
        lines.append(f"{count} edits of {component} at {positions}, layers {', '.join(map(str, layers))}")
    if facts.weight_deltas:
        replaced = sum(delta.replaces for delta in facts.weight_deltas)
        ranks = sorted({delta.rank for delta in facts.weight_deltas if delta.rank})
        rank = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        lines.append(
            f"{len(facts.weight_deltas)} changes of weights{rank}"
            + (f", {replaced} with parameters replaced" if replaced else "")
        )
    others = Counter(node.partition("(")[0] for node in facts.other_nodes)
    return lines + [f"{count} {kind}: {', '.join(_inside(facts, kind))}" for kind, count in others.items()]


def _inside(facts: ProgramFacts, kind: str) -> list[str]:
    return [node[len(kind) + 1 : -1] for node in facts.other_nodes if node.startswith(f"{kind}(")]
