from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adapters_store import Store
from adapters_store.commands.archive import export, import_
from reft_plugins.errors import VersionConflictError


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs `export` or `import`."""

    def invoke(command: str, *arguments: object) -> Result:
        return CliRunner().invoke({"export": export, "import": import_}[command], [str(each) for each in arguments])

    return invoke


def test_the_journey(run: Callable[..., Result], store: Store, adapters: list[Path], tmp_path: Path) -> None:
    store.add(adapters[0], "a:x")
    store.add(adapters[1], "b:y")
    written = run("export", tmp_path / "a.tar", "--all")
    assert written.exit_code == 0, written.output
    assert "exported a@v1" in written.stdout and "2 versions, 0 attachments" in written.stdout
    told = json.loads(run("export", tmp_path / "b.tar", "b", "--json").stdout)
    assert told["versions"] == [{"reference": "b@v1", "tags": ["y"]}]
    assert told["size"] == (tmp_path / "b.tar").stat().st_size
    Store.init(tmp_path / "second")
    to_second = ("--store", tmp_path / "second")
    read = run("import", tmp_path / "a.tar", *to_second)
    assert read.exit_code == 0, read.output
    assert "imported a@v1" in read.stdout and "imported b@v1" in read.stdout
    assert "already there: a@v1" in run("import", tmp_path / "a.tar", "a", *to_second).stdout
    told = json.loads(run("import", tmp_path / "a.tar", "a", "--as", "c", "--json", *to_second).stdout)
    assert [version["reference"] for version in told["versions"]] == ["c@v1"]
    assert [record.reference for record in Store.open(tmp_path / "second").list()] == ["a@v1", "b@v1", "c@v1"]


def test_a_conflict_fails_and_says_the_way_out(
    run: Callable[..., Result], store: Store, adapters: list[Path], tmp_path: Path
) -> None:
    store.add(adapters[0], "a:x")
    run("export", tmp_path / "a.tar", "a")
    Store.init(tmp_path / "second").add(adapters[1], "a:x")
    result = run("import", tmp_path / "a.tar", "--store", tmp_path / "second")
    assert isinstance(result.exception, VersionConflictError)
    assert "--as NAME" in str(result.exception) and "--renumber" in str(result.exception)
    renumbered = run("import", tmp_path / "a.tar", "--renumber", "--store", tmp_path / "second")
    assert "imported a@v2" in renumbered.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "a.tar"),
        ("export", "a.tar", "a", "--all"),
        ("export", "a.tar", "A:x"),
        ("export",),
        ("import",),
        ("import", "missing.tar"),
        ("import", ".", "--as", "b"),
        ("import", __file__, "--as", "b:x"),
        ("import", __file__, "--as", "b@v1"),
    ],
)
def test_wrong_use_exits_with_2(run: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
