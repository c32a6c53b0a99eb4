"""`reft completion`: what shells offer while somebody types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import needs_program
from shell_terminal import Terminal

from adapters_store import Store
from adapters_store.completion import candidates
from reft_plugins.errors import ReftError

REFT = "import sys; sys.argv[0] = 'reft'; from reft_plugins.cli import main; main()"

TYPED = {
    "reft compl\t": ["reft", "completion"],
    "reft store sho\t": ["reft", "store", "show"],
    "reft store show sen\t": ["reft", "store", "show", "sentiment"],
    "reft store show sentiment:la\t": ["reft", "store", "show", "sentiment:latest"],
    "reft store show sentiment@\t": ["reft", "store", "show", "sentiment@v"],
    "reft store show team/t\t": ["reft", "store", "show", "team/tone@v1"],
    "reft store show team/tone@v\t": ["reft", "store", "show", "team/tone@v1"],
    "reft store show nothing\t": ["reft", "store", "show", "nothing"],
    "reft generate BASE --adapter sentiment:p\t": ["reft", "generate", "BASE", "--adapter", "sentiment:prod"],
    "reft generate BASE --adapter=sentiment:p\t": ["reft", "generate", "BASE", "--adapter=sentiment:prod"],
    "reft serve BASE --adapter a=sentiment:p\t": ["reft", "serve", "BASE", "--adapter", "a=sentiment:prod"],
    "reft inspect 'sentiment:p\t": ["reft", "inspect", "sentiment:prod"],
}


@pytest.fixture
def filled(store: Store, adapters: list[Path]) -> Store:
    store.add(adapters[0], "sentiment:prod")
    store.add(adapters[1], "sentiment:latest")
    store.add(adapters[2], "team/tone")
    return store


@pytest.fixture
def environment(filled: Store, tmp_path: Path) -> dict[str, str]:
    """In which `reft` is the command under test, whatever is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "reft").write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{REFT}" "$@"\n')
    (folder / "reft").chmod(0o755)
    (tmp_path / "home").mkdir()
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "REFT_STORE": str(filled.root),
        "HISTFILE": "",
    }


def test_names_first_then_their_tags_and_versions(filled: Store) -> None:
    sentiment = ["sentiment:latest", "sentiment:prod", "sentiment@v2", "sentiment@v1"]
    assert candidates("") == ["sentiment", "team/tone"]
    assert candidates("s") == candidates("sentiment") == sentiment
    assert candidates("sentiment:") == sentiment[:2]
    assert candidates("sentiment@v") == sentiment[2:]
    assert candidates("t") == ["team/tone@v1"]
    assert candidates("x") == candidates("x:") == candidates("@") == candidates("sentiment@sha256:") == []
    filled.add(filled.checkout("team/tone@v1"), "sentiment2:y")
    assert candidates("s") == ["sentiment", "sentiment2"]
    assert candidates("sentiment") == [*sentiment, "sentiment", "sentiment2"]


@needs_program("bash")
def test_in_bash(environment: dict[str, str]) -> None:
    with Terminal(["bash", "--norc", "--noprofile", "-i"], environment) as terminal:
        terminal.run('eval "$(reft completion bash)"')
        assert {typed: terminal.completed(typed) for typed in TYPED} == TYPED
        assert terminal.completed("A=1 reft compl\t") == ["A=1", "reft", "completion"]
        terminal.run("mkdir -p $HOME/folder; cd $HOME")
        assert terminal.completed("reft inspect ./fol\t") == ["reft", "inspect", "./folder/"]
        listed = terminal.listed("reft store show sentiment\t\t")
    for reference in ("sentiment:latest", "sentiment:prod", "sentiment@v1", "sentiment@v2"):
        assert reference in listed


@needs_program("bash")
def test_without_the_script_bash_completes_nothing(environment: dict[str, str]) -> None:
    """Or the test above would prove nothing."""
    with Terminal(["bash", "--norc", "--noprofile", "-i"], environment) as terminal:
        assert terminal.completed("reft compl\t") == ["reft", "compl"]


@needs_program("zsh")
def test_in_zsh(environment: dict[str, str]) -> None:
    with Terminal(["zsh", "-f", "-i"], environment) as terminal:
        terminal.run("unsetopt prompt_sp; autoload -Uz compinit; compinit -u -D")
        terminal.run('eval "$(reft completion zsh)"')
        assert {typed: terminal.completed(typed) for typed in TYPED} == TYPED


@needs_program("fish")
def test_in_fish(environment: dict[str, str]) -> None:
    def completed(line: str) -> list[str]:
        script = f"reft completion fish | source; complete -C '{line}'"
        run = subprocess.run(
            ["fish", "--no-config", "-c", script],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return [found.partition("\t")[0] for found in run.stdout.splitlines()]

    assert completed("reft compl") == ["completion"]
    assert completed("reft store show sentiment:") == ["sentiment:latest", "sentiment:prod"]
    assert completed("reft generate x --adapter=sentiment:p") == ["--adapter=sentiment:prod"]
    assert completed("reft serve x --adapter a=sentiment:p") == ["a=sentiment:prod"]


def _complete(line: str, environment: dict[str, str], code: str = REFT) -> subprocess.CompletedProcess[str]:
    asked = {"_REFT_COMPLETE": "bash_complete", "COMP_LINE": line, "COMP_WORDBREAKS": ":=@"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, **asked},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_nothing_heavy_is_imported(environment: dict[str, str]) -> None:
    code = (
        REFT.removesuffix("main()")
        + "\ntry:\n    main()\nfinally:\n    print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    for line in ("reft store show sentiment:l", "reft generate x --adapter sentiment:l"):
        run = _complete(line, environment, code)
        assert run.stdout.splitlines() == ["plain,latest", "[]"], run.stderr


@pytest.mark.parametrize("damage", ["index", "history", "marker", "configuration", "folder"])
def test_a_broken_store_is_silent(filled: Store, environment: dict[str, str], damage: str, tmp_path: Path) -> None:
    if damage == "index":
        (filled.root / "index.json").write_text("{")
    elif damage == "history":
        (filled.root / "history.jsonl").write_bytes(b"x" * 300 + b"\n")
        (filled.root / "index.json").write_bytes(
            (filled.root / "index.json").read_bytes().replace(b'"vnd.reft.history":"', b'"vnd.reft.history":"0,')
        )
    elif damage == "marker":
        (filled.root / "oci-layout").write_text("{}")
    elif damage == "configuration":
        (tmp_path / "config.toml").write_text("[")
        environment |= {"REFT_CONFIG": str(tmp_path / "config.toml"), "REFT_STORE": ""}
    else:
        environment["REFT_STORE"] = str(tmp_path / "nowhere")
    for line in ("reft store show sen", "reft generate x --adapter sen"):
        run = _complete(line, environment)
        assert (run.returncode, run.stderr) == (0, "")
        assert "sentiment" not in run.stdout


def test_a_plugin_that_fails_is_silent(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    from reft_plugins.cli.completion import references
    from reft_plugins.hookspecs import hookimpl
    from reft_plugins.plugins import manager

    class Failing:
        @hookimpl
        def reft_complete_reference(self, incomplete: str) -> list[str]:
            raise ReftError("no")

    class Offering:
        @hookimpl
        def reft_complete_reference(self, incomplete: str) -> list[str]:
            return ["sentiment@elsewhere", "other"]

    plugins = [Failing(), Offering()]
    for plugin in plugins:
        manager().register(plugin)
    try:
        found = references(click.Context(click.Command("x")), click.Argument(["x"]), "sentiment@")
    finally:
        for plugin in plugins:
            manager().unregister(plugin)
    assert {item.value for item in found} == {"sentiment@elsewhere", "sentiment@v1", "sentiment@v2"}
