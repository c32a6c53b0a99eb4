from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from adapter_variants import flip_bit
from click.testing import CliRunner, Result

from adapters_store import Store
from adapters_store.commands import store as group
from reft_plugins.errors import ReftError

Invoke = Callable[..., Result]


@pytest.fixture
def reft_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs `reft store …` with an empty REFT_STORE."""
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "store"))

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(group, [str(each) for each in arguments])

    return invoke


def _json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_journey(reft_store: Invoke, adapters: list[Path], tmp_path: Path) -> None:
    assert reft_store("init").exit_code == 0
    added = reft_store("add", adapters[0], "sentiment:latest")
    assert added.exit_code == 0
    assert "added sentiment@v1" in added.stdout
    assert "already there: sentiment@v1" in reft_store("add", adapters[0], "sentiment").stdout
    reft_store("add", adapters[1], "sentiment:latest")
    assert reft_store("tag", "sentiment@v1", "prod").exit_code == 0
    table = reft_store("ls").stdout.splitlines()
    assert table[0].split() == ["NAME", "VERSION", "TAGS", "METHOD", "BASE", "SIZE", "DIGEST"]
    assert [line.split()[:5] for line in table[1:]] == [
        ["sentiment", "v1", "prod", "loreft", "tiny-llama"],
        ["sentiment", "v2", "latest", "loreft", "tiny-llama"],
    ]
    shown = reft_store("show", "sentiment:prod").stdout
    assert "sentiment@v1" in shown
    assert "2 edits at f2+l2" in shown
    assert "everything is sound" in reft_store("verify").stdout


def test_json(reft_store: Invoke, adapters: list[Path], tmp_path: Path) -> None:
    assert _json(reft_store("init", "--json")) == {"store": str(tmp_path / "store")}
    first = _json(reft_store("add", adapters[0], "sentiment:latest", "--json"))
    assert (first["name"], first["version"], first["tags"], first["added"]) == ("sentiment", 1, ["latest"], True)
    assert _json(reft_store("ls", "--json")) == [{**first, "added": False}]
    shown = _json(reft_store("show", "sentiment@v1", "--json"))
    assert shown["digest"] == first["digest"]
    assert shown["adapter"] == json.loads((adapters[0] / "adapter.json").read_text())
    assert shown["manifest"]["artifactType"] == "application/vnd.reft.adapter.v1"
    assert _json(reft_store("tag", "sentiment@v1", "prod", "--json"))["tags"] == ["latest", "prod"]
    report = _json(reft_store("verify", "--json"))
    assert (report["ok"], report["versions"], report["tags"], report["problems"]) == (True, 1, 2, [])


def test_ls_says_why_it_shows_nothing(reft_store: Invoke, adapters: list[Path], tmp_path: Path) -> None:
    reft_store("init")
    assert "no versions yet" in reft_store("ls").stderr
    reft_store("add", adapters[0], "sentiment:latest")
    assert reft_store("ls").stderr == ""
    for arguments, reason in (
        (("sentimen",), "no adapter is called 'sentimen'. There are: sentiment"),
        (("--metric", "acuracy>=0.5"), "no version has a metric 'acuracy'"),
        (("sent*", "--tag", "prod"), "no version is like that; the store has 1"),
    ):
        for form in ((), ("--json",)):
            result = reft_store("ls", *arguments, *form)
            assert (result.exit_code, result.stdout.count("sentiment")) == (0, 0)
            assert reason in result.stderr


def test_what_rm_removed_is_told_also_where_the_next_is_refused(
    reft_store: Invoke, adapters: list[Path], tmp_path: Path
) -> None:
    reft_store("init")
    for adapter in adapters[:2]:
        reft_store("add", adapter, "sentiment")
    result = reft_store("rm", "sentiment@v1", "nothing@v1", "--json")
    assert isinstance(result.exception, ReftError)
    assert [each["reference"] for each in json.loads(result.stdout)] == ["sentiment@v1"]
    assert [each["reference"] for each in _json(reft_store("ls", "--json"))] == ["sentiment@v2"]
    assert "removed sentiment@v2" in reft_store("rm", "sentiment@v2", "nothing@v1").stdout


def test_tags_that_look_like_other_versions(reft_store: Invoke, adapters: list[Path], tmp_path: Path) -> None:
    reft_store("init")
    assert reft_store("add", adapters[0], "sentiment:v1").stderr == ""
    assert "looks like version 1," in reft_store("add", adapters[1], "sentiment:v1").stderr
    assert "looks like version 7," in reft_store("tag", "sentiment@v1", "v7").stderr
    assert reft_store("tag", "sentiment@v1", "latest").stderr == ""


def test_another_store_by_option(reft_store: Invoke, adapters: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert reft_store("init", "--store", other).exit_code == 0
    assert reft_store("add", adapters[0], "a:x", "--store", other).exit_code == 0
    assert [record.name for record in Store.open(other).list()] == ["a"]
    assert not (tmp_path / "store").exists()


def test_verify_fails_when_anything_is_wrong(reft_store: Invoke, adapters: list[Path], tmp_path: Path) -> None:
    reft_store("init")
    reft_store("add", adapters[0], "sentiment:latest")
    blobs = sorted((tmp_path / "store" / "blobs" / "sha256").iterdir())
    for path in blobs[:2]:
        flip_bit(path)
    text, data = reft_store("verify"), reft_store("verify", "--json")
    assert (text.exit_code, data.exit_code) == (1, 1)
    assert all(path.name in text.stdout for path in blobs[:2])
    assert len(json.loads(data.stdout)["problems"]) == 2
    (tmp_path / "store" / "oci-layout").write_text("{}")
    assert len(json.loads(reft_store("verify", "--json").stdout)["problems"]) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("add",),
        ("add", "missing-folder", "a:x"),
        ("add", ".", "A:x"),
        ("add", ".", "a@v1"),
        ("show", "../x"),
        ("tag", "a@v1"),
        ("tag", "a@v1", "b:x"),
        ("tag", "a@v1", "x/y"),
        ("ls", "--what"),
        ("ls", "--metric", "accuracy=>0.9"),
        ("untag", "a@v1"),
        ("diff", "a@v1", "./missing-folder"),
    ],
)
def test_wrong_use_exits_with_2(reft_store: Invoke, arguments: tuple[str, ...]) -> None:
    result = reft_store(*arguments)
    assert result.exit_code == 2, result.output
    assert "Usage: " in result.output


@pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("show", "a:x"), ("tag", "a:x", "y"), ("add", ".", "a:x")])
def test_without_a_store_the_error_says_init(reft_store: Invoke, arguments: tuple[str, ...]) -> None:
    result = reft_store(*arguments)
    assert isinstance(result.exception, ReftError)
    assert "reft store init" in str(result.exception)


def test_control_sequences_do_not_reach_the_terminal(reft_store: Invoke, adapters: list[Path], tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "adapter.safetensors").write_bytes((adapters[0] / "adapter.safetensors").read_bytes())
    manifest = json.loads((adapters[0] / "adapter.json").read_text())
    manifest["base"]["name"] = "\x1b]0;owned\x07[red]x[/red]"
    (hostile / "adapter.json").write_text(json.dumps(manifest))
    reft_store("init")
    reft_store("add", hostile, "a:x")
    for command in (("ls",), ("show", "a:x")):
        output = reft_store(*command).stdout
        assert "owned" in output
        assert "[red]x[/red]" in output
        assert "\x1b" not in output
        assert "\x07" not in output


def test_every_command_has_an_example_and_json() -> None:
    def check(group: click.Group, path: str) -> None:
        for name, command in group.commands.items():
            assert f"{path} {name}" in str(command.help).partition("Example:")[2], name
            if isinstance(command, click.Group):
                check(command, f"{path} {name}")
            elif name != "cat":  # which writes a file as it is
                assert "--json" in {option for param in command.params for option in param.opts}

    check(group, "reft store")


def test_nothing_here_imports_torch(adapters: list[Path], tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import adapters_store.plugin, adapters_store.commands
light = set(sys.modules)
assert not light & {{"torch", "pydantic", "numpy", "safetensors", "filelock", "rich.table"}}, light
from adapters_store import Store
from adapters_store.resolve import resolve
from adapters_store.commands import store
made = Store.init({str(tmp_path / "store")!r})
made.add({str(adapters[0])!r}, "a:x")
assert made.verify().ok
made.checkout("a:x"), made.show("a:x"), made.list(), made.tag("a:x", "y"), resolve("a:x")
store.main(["ls", "--store", {str(tmp_path / "store")!r}], standalone_mode=False)
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "tiny-llama" in result.stdout
