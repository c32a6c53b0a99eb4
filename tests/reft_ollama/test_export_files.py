"""Files of an export appear together or not at all: every failure on the way, and what is left of earlier exports."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import as_adapter

from reft_ollama import files
from reft_ollama.export import export_ollama
from reft_ollama.files import Staging
from reft_ollama.weights import gguf_file
from reft_plugins.adapter import Adapter
from reft_plugins.errors import ExportError
from reft_plugins.program import ALL, Edit, Site, WeightDelta

LAST = ["about", "Modelfile"]


def put(directory: Path, *names: str, **options: Any) -> None:
    with Staging(directory, last=LAST, **options) as staging:
        for name in names:
            staging.path(name).write_text(f"new {name}")


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_files_appear_together_and_replace_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with Staging(out, replaces=["old.gguf", "model.gguf", "Modelfile"], last=LAST) as staging:
        for name in ("old.gguf", "mine.txt", "Modelfile", "model.gguf"):
            (out / name).write_text("old")
        for name in ("model.gguf", "Modelfile", "about"):
            staging.path(name).write_text(f"new {name}")
        assert (out / "model.gguf").read_text() == "old" and not (out / "about").exists()
    new = {name: f"new {name}" for name in ("model.gguf", "Modelfile", "about")}
    assert contents(out) == {**new, "mine.txt": "old"}


@pytest.mark.parametrize("failing", ["fsync", "replace", "unlink"])
def test_no_file_speaks_of_another_one_that_is_not_there(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing is stopped at each of its steps in turn: what describes a file stands only beside that very file."""
    owner: Any = files.os if failing == "fsync" else Path
    real = getattr(owner, failing)
    states = set()
    for step in range(20):
        out = tmp_path / str(step)
        out.mkdir()
        for name in ("model.gguf", "model-q8_0.gguf", "Modelfile", "about"):
            (out / name).write_text("old")
        calls = 0

        def stop(*words: Any, step: int = step) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise KeyboardInterrupt
            return real(*words)

        monkeypatch.setattr(owner, failing, stop)
        with contextlib.suppress(KeyboardInterrupt):
            put(out, "model.gguf", "model-q4_0.gguf", "Modelfile", "about", replaces=["model-q8_0.gguf"])
        monkeypatch.setattr(owner, failing, real)
        found = contents(out)
        assert not any(name.startswith(".") for name in found)
        if "Modelfile" in found or "about" in found:
            speaking = {found.get(name, "").split(" ")[0] for name in LAST} - {""}
            assert len(speaking) == 1 and found["model.gguf"].startswith(speaking.pop())
        states.add(tuple(sorted((name, text[:3]) for name, text in found.items())))
    complete = {(name, "new") for name in ("model.gguf", "model-q4_0.gguf", "Modelfile", "about")}
    assert len(states) > 1 and any(set(state) == complete for state in states)


def test_a_crash_is_cleared_up_by_the_next_export(tmp_path: Path) -> None:
    stage = tmp_path / files.STAGE
    stage.mkdir()
    (stage / "model.gguf").write_text("half")
    (stage / "folder").mkdir()
    put(tmp_path, "Modelfile")
    assert contents(tmp_path) == {"Modelfile": "new Modelfile"}


def test_two_exports_into_one_directory(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        staging.path("a").write_text("first")
        with pytest.raises(ExportError, match="another export is writing there"):
            put(tmp_path / "out", "b")
    assert contents(tmp_path / "out") == {"a": "first"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_failure_leaves_nothing_not_even_folders(failure: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(failure), Staging(tmp_path / "a" / "b") as staging:
        staging.path("model.gguf").write_text("half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path) -> None:
    """`/dev/full` is a file on a disk that is always full."""
    with (
        pytest.raises(ExportError, match=r"out: the disk is full.*No space left.*Nothing was written.*--dtype"),
        Staging(tmp_path / "out") as staging,
    ):
        staging.path("model.gguf").symlink_to("/dev/full")
        staging.path("model.gguf").write_text("text")
    assert list(tmp_path.iterdir()) == []


def test_space_is_asked_for_beforehand(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        staging.require(1)
        with pytest.raises(ExportError, match=r"needs 1,000,000,000.00 GB and the disk has .* GB free.*--dtype"):
            staging.require(10**18)


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere", "/sys/nowhere", "n" * 300])
def test_directories_that_cannot_be_written_to(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"cannot be written to \(.*Choose another directory with --out"):
        put(tmp_path / where, "model.gguf")
    assert contents(tmp_path) == {"file": "mine"}


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (OSError("unknown"), BrokenPipeError(errno.EPIPE, "the terminal is gone")):
        with pytest.raises(type(error)) as raised, Staging(tmp_path / "out"):
            raise error
        assert raised.value is error


def constant(base: Path) -> Adapter:
    return as_adapter(base, Edit(Site(1), ALL, shift=torch.ones(128)))


@pytest.mark.parametrize(
    ("failure", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), ExportError)],
)
def test_an_interrupted_export_leaves_the_previous_one_untouched(
    failure: BaseException,
    seen: type[BaseException],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export_ollama(constant(tiny_llama), tiny_llama, tmp_path / "old", measure=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    written = 0
    encode = gguf_file.encode

    def interrupted(*words: Any) -> Any:
        nonlocal written
        written += 1
        if written == 20:
            raise failure
        return encode(*words)

    monkeypatch.setattr(gguf_file, "encode", interrupted)
    for directory in ("old", "new"):
        written = 0
        with pytest.raises(seen):
            export_ollama(constant(tiny_llama), tiny_llama, tmp_path / directory, dtype="bf16", measure=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_values_that_do_not_fit_the_format_are_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    a, b = torch.ones(1, 128) * 300, torch.ones(352, 1) * 300
    adapter = as_adapter(tiny_llama, WeightDelta("model.layers.0.mlp.up_proj", a, b))
    with pytest.raises(ExportError, match=r"up_proj.*does not fit f16.*bf16"):
        export_ollama(adapter, tiny_llama, tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists()
    assert export_ollama(adapter, tiny_llama, tmp_path / "out", dtype="bf16", measure=False).gguf.exists()


def test_several_number_formats(tiny_llama: Path, tmp_path: Path) -> None:
    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir() if path.name.startswith(("model", "Modelfile", "source"))}

    result = export_ollama(constant(tiny_llama), tiny_llama, tmp_path, dtype=["q4_0", "q8_0", "q6_k"], measure=False)
    further = {"model-q8_0.gguf", "Modelfile-q8_0", "model-q6_k.gguf", "Modelfile-q6_k"}
    assert names() == {"model.gguf", "Modelfile", *further}
    assert "FROM ./model-q6_k.gguf\n" in (tmp_path / "Modelfile-q6_k").read_text()
    assert "FROM ./model.gguf\n" in result.modelfile.read_text()
    assert "exact by construction, not measured" in result.modelfile.read_text()
    assert result.fidelity is None and json.loads((tmp_path / "fidelity.json").read_text())
    sizes = [(tmp_path / name).stat().st_size for name in ("model.gguf", "model-q6_k.gguf", "model-q8_0.gguf")]
    assert sizes == sorted(sizes)
    export_ollama(constant(tiny_llama), tiny_llama, tmp_path, dtype="f32", measure=False)
    assert names() == {"model.gguf", "Modelfile"}, "an earlier export's further files are no part of this one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "q3"}, "q3: there is no such number format; there are f32, f16, bf16, q8_0, q4_0"),
        ({"dtype": ["f16", "f16"]}, "each of them once"),
        ({"dtype": []}, "at least one number format"),
    ],
)
def test_wrong_number_formats(options: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_ollama(constant(tiny_llama), tiny_llama, tmp_path / "out", **options)


def test_only_exact_exports_need_no_measuring(tiny_llama: Path, tmp_path: Path) -> None:
    edit = Edit(Site(1), ALL, down=torch.ones(1, 128), up=torch.ones(1, 128))
    with pytest.raises(ExportError, match=r"block_output.*has to be measured. Leave out --no-measure"):
        export_ollama(as_adapter(tiny_llama, edit), tiny_llama, tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists()
