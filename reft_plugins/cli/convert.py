"""`reft convert`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("convert")
@click.argument("adapter")
@click.option("--to", "target", required=True, help="The library whose files to write: peft, pyreft, ….")
@click.option("--base", help="The base model, where the files of the other library hold weights of it.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the files; new, or an empty one."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(adapter: str, target: str, base: str | None, out: Path, as_json: bool) -> None:
    """Write ADAPTER as another library reads it, and say what its files cannot.

    Example: reft convert polite:latest --to peft --out polite-peft
    """
    from reft_plugins import load, plugins
    from reft_plugins.base_model import BaseModel
    from reft_plugins.errors import AdapterError

    written = {name: format for name, format in plugins.formats.all().items() if getattr(format, "writes", False)}
    if target not in written:
        raise click.BadParameter(f"{target!r} is none of the formats written here: {', '.join(sorted(written))}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out}: already there and not empty; choose another folder or remove it")
    loaded = load(adapter, base=base)
    lost = written[target].write(loaded, out, None if base is None else BaseModel.open(base))
    files = sorted(path.name for path in out.iterdir())
    if as_json:
        click.echo(json.dumps({"out": str(out), "format": target, "files": files, "not_said": lost}, indent=2))
        return
    for note in lost:
        click.echo(f"{'not said':12} {note}")
    click.echo(f"{'written':12} {', '.join(files)}")
    click.echo(f"saved to {out}")
