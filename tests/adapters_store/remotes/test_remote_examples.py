"""The example in every command's help does what it says, as it stands."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from adapter_variants import exact_certificate
from click.testing import CliRunner
from docker_registry import DockerRegistry
from programs import needs_program

from adapters_store import Store
from adapters_store.commands import store as group
from adapters_store.remotes.transfer import connect, push
from adapters_store.trust.keys import generate


def examples(command: click.Command) -> Iterator[str]:
    yield " ".join(str(command.help).partition("Example:")[2].split())
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from examples(each)


EXAMPLES = sorted(set(examples(group)))
MAKES = {"add": "my-adapter", "checkout": "my-adapter", "export": "sentiment.tar", "keygen": "release.pem"}
"""What a command finds or makes; for others it is there already."""


@pytest.fixture
def address(docker_registry: DockerRegistry, prefix: str) -> str:
    return docker_registry.address(prefix)


@pytest.fixture
def folder(tmp_path: Path, store: Store, adapters: list[Path], address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the examples name."""
    for number, adapter in enumerate(adapters):
        store.add(adapter, "sentiment:latest" if number == 0 else "sentiment")
        store.add(adapter, "both:latest")
    store.tag("sentiment@v2", "prod")
    store.tag("sentiment@v2", "beta")
    push(store, "sentiment:prod", connect(f"{address}/team"))
    push(store, "sentiment@v3", connect(f"{address}/dev"))
    monkeypatch.chdir(tmp_path)
    store.export("sentiment.tar", ["sentiment"])
    generate(Path("release.pem"))
    Path("exported").mkdir()
    Path("exported/fidelity.json").write_text(exact_certificate(adapters[2]).text())
    shutil.copytree(adapters[0], "my-adapter")
    return tmp_path


def test_all_commands_have_one() -> None:
    assert len(EXAMPLES) >= 26
    assert all(each.startswith(("reft store ", "REFT_STORE=adapters reft store init")) for each in EXAMPLES)


@needs_program("docker-registry")
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_as_they_stand(example: str, folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(example.partition(" | ")[0].replace("oci://registry.example", address))
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert words[:2] == ["reft", "store"]
    name, *arguments = words[2:]
    made = folder / MAKES.get(name, "nothing")
    if name == "serve":
        group.commands[name].make_context(name, arguments)  # it would never end
        return
    if name == "checkout":
        shutil.rmtree(made)
    elif name in ("export", "keygen"):
        made.unlink()
        made.with_suffix(".pub").unlink(missing_ok=True)
    if name == "verify":
        assert CliRunner().invoke(group, ["sign", "sentiment@v3", "--key", "release.pem"]).exit_code == 0
    result = CliRunner().invoke(group, [name, *arguments])
    assert (result.exit_code, result.exception) == (0, None), (example, result.output, result.exception)
    assert result.output
    assert made.exists() or name not in MAKES
