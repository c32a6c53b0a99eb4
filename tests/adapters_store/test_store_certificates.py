"""Certificates of exports, attached to the versions they are about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_variants import exact_certificate
from click.testing import CliRunner, Result

from adapters_store import Store
from adapters_store.commands.attachments import attach, attach_certificate, attachments
from reft_plugins.errors import DataError, StoreError
from reft_plugins.fidelity.certificate import parse_certificate


def _run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(each) for each in arguments])  # type: ignore[arg-type]


def test_a_certificate_is_attached_and_read_back(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    store.add(adapters[0], "a:x")
    certificate = exact_certificate(adapters[0])
    (tmp_path / "fidelity.json").write_text(certificate.text())
    first = _run(attach, "a:x", tmp_path / "fidelity.json", "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(_run(attach, "a@v1", tmp_path, "--json").stdout) == json.loads(first.stdout)
    [found] = store.attachments("a:x", "application/vnd.reft.certificate.v1")
    text = store.blobs.read(found.files["certificate.json"], 1_000_000)
    assert parse_certificate(text, "-").text() == certificate.text()
    told = json.loads(_run(attachments, "a:x", "--json").stdout)
    assert told == [found.to_dict()]
    assert "certificate.json" in _run(attachments, "a:x").stdout
    assert store.verify().ok


def test_a_certificate_of_another_adapter_is_refused(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    store.add(adapters[0], "a:x")
    store.add(adapters[1], "a:y")
    path = tmp_path / "fidelity.json"
    path.write_text(exact_certificate(adapters[0]).text())
    with pytest.raises(StoreError, match="Attach it to the version that was exported"):
        attach_certificate(store, "a:y", path)
    assert store.attachments("a:y") == ()
    attach_certificate(store, "a:x", path)


@pytest.mark.parametrize("text", ["", "{}", '{"schema":"reft-export/9"}', "[" * 100_000])
def test_what_is_no_certificate_is_refused(store: Store, adapters: list[Path], tmp_path: Path, text: str) -> None:
    store.add(adapters[0], "a:x")
    (tmp_path / "fidelity.json").write_text(text)
    with pytest.raises(DataError, match=r"fidelity\.json"):
        attach_certificate(store, "a:x", tmp_path)
    assert store.attachments("a:x") == ()


def test_a_file_that_is_too_large_is_not_read(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    store.add(adapters[0], "a:x")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StoreError, match="the limit for attachments"):
        attach_certificate(store, "a:x", tmp_path / "huge")
    with pytest.raises(StoreError, match="cannot read"):
        attach_certificate(store, "a:x", tmp_path / "missing")


def test_torch_is_not_imported_before_it_is_needed() -> None:
    script = (
        "import sys, adapters_store.commands\nfrom reft_plugins.cli import main, _add_commands\n_add_commands()\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "False"
