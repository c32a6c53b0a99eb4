"""`reft store`: the store on the command line. A module per topic; each lists its commands in `COMMANDS`."""

from __future__ import annotations

from importlib import import_module

import click

_TOPICS = (
    "publishing",
    "listing",
    "comparing",
    "history",
    "remote",
    "archive",
    "files",
    "attachments",
    "trust",
    "upkeep",
    "serving",
)


@click.group("store")
def store() -> None:
    """Keep adapters in a versioned, verified store.

    The store is an OCI image layout in one folder: --store, else REFT_STORE, else what the configuration says, else
    reft/store in your data folder. References are NAME:TAG (moves), NAME@vN and NAME@sha256:DIGEST (never change).

    \b
    ~/.config/reft/config.toml, or the file that REFT_CONFIG names:
      [store]
      path = "~/adapters"
      remotes = ["oci://registry.example/team"]   # where runtimes look for what is missing
      refresh = 300                               # seconds after which a tag is looked up there again
      [trust]
      policy = "policy.toml"

    Example: reft store add my-adapter sentiment:latest
    """


for _topic in _TOPICS:
    for _command in import_module(f"{__name__}.{_topic}").COMMANDS:
        store.add_command(_command)
