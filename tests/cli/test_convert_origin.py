"""What `reft convert` made of an adapter knows it as its parent when it is imported again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from strong_adapters import strong_lora, strong_loreft

import reft_plugins as reft
from reft_plugins.manifest import Manifest
from reft_plugins.origin import ORIGIN_FILE

Convert = Callable[[str], Path]


@pytest.fixture
def convert(run: Any, tiny_llama: Path, tmp_path: Path) -> Convert:
    def made(target: str) -> Path:
        adapter = strong_lora(tiny_llama, seed=0) if target == "peft" else strong_loreft(tiny_llama, "f1", seed=0)
        adapter.save(tmp_path / "own")
        written = run("convert", tmp_path / "own", "--to", target, "--out", tmp_path / target)
        assert written.code == 0, written.err
        return tmp_path / target

    return made


def imported(run: Any, base: Path, source: Path, *more: str) -> Manifest:
    out = source.with_name(f"{source.name}-again")
    done = run("import", source, "--base", base, "--out", out, *more)
    assert done.code == 0, done.err
    return reft.load(out).manifest


@pytest.mark.parametrize(("target", "options"), [("peft", ()), ("pyreft", ("--positions", "f1"))])
def test_the_parent_is_kept(
    run: Any, convert: Convert, tiny_llama: Path, target: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    folder = convert(target)
    parents = imported(run, tiny_llama, folder, *options).parents
    assert [(each.relation, each.source) for each in parents] == [
        ("imported", f"{target}:{target}"),
        ("converted", "own"),
    ]
    assert parents[1].digest == reft.load(tmp_path / "own").digest


def test_files_that_changed_have_no_such_parent(run: Any, convert: Convert, tiny_llama: Path) -> None:
    folder = convert("peft")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert [each.relation for each in imported(run, tiny_llama, folder).parents] == ["imported"]


@pytest.mark.parametrize("wrong", ["{", "[]", '{"schema": "reft-origin/9"}', "outside", "nothing"])
def test_an_origin_that_says_nothing_is_passed_over(
    run: Any, convert: Convert, tiny_llama: Path, tmp_path: Path, wrong: str
) -> None:
    folder = convert("peft")
    origin = folder / ORIGIN_FILE
    document = json.loads(origin.read_text())
    if wrong == "outside":
        for file in document["files"]:
            file["name"] = f"../{folder.name}-copy/{file['name']}"
        folder.with_name(f"{folder.name}-copy").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
        for path in folder.iterdir():
            (tmp_path / "elsewhere" / path.name).write_bytes(path.read_bytes())
        wrong = json.dumps(document)
    elif wrong == "nothing":
        wrong = json.dumps({**document, "files": []})
    origin.write_text(wrong)
    assert [each.relation for each in imported(run, tiny_llama, folder).parents] == ["imported"]


def test_our_own_directories_are_what_they_are(tiny_llama: Path, convert: Convert, tmp_path: Path) -> None:
    folder = convert("peft")
    digest = reft.load(tmp_path / "own").digest
    for path in folder.iterdir():
        (tmp_path / "own" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "own" / "adapter_config.json").unlink()
    assert reft.load(tmp_path / "own").digest == digest
