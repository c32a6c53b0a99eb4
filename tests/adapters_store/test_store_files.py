"""`cat`, `checkout` and `du`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_variants import flip_bit, vary
from click.testing import CliRunner, Result

from adapters_store import Store
from adapters_store.commands.files import cat, checkout, du
from adapters_store.copies import copy_out
from adapters_store.upkeep.usage import Space, usage
from reft_plugins.errors import ReftError, StoreError


def _run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(each) for each in arguments])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_cat_writes_the_files_bytes(store: Store, adapters: list[Path], name: str) -> None:
    store.add(adapters[0], "a:x")
    assert _run(cat, "a:x", name).stdout_bytes == (adapters[0] / name).read_bytes()


def test_cat_writes_the_manifest_where_no_file_is_named(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "a:x")
    assert json.loads(_run(cat, "a@v1").stdout)["method"] == "loreft"
    assert _run(cat, "a@v1", "other.json").exit_code == 2
    assert isinstance(_run(cat, "b:x").exception, ReftError)


def test_cat_writes_nothing_of_a_damaged_blob(
    store: Store, adapters: list[Path], blob: Callable[[str, str], Path]
) -> None:
    store.add(adapters[0], "a:x")
    flip_bit(blob("a:x", "tensors"))
    result = _run(cat, "a:x", "adapter.safetensors")
    assert isinstance(result.exception, StoreError)
    assert result.stdout_bytes == b""


def test_a_broken_pipe_is_no_traceback(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    """More than a pipe holds, to a reader that is gone."""
    large = vary(adapters[0], tmp_path / "large", "x" * 3_000_000)
    store.add(large, "a:x")
    code = "from reft_plugins.cli import main; main()"
    command = f"{sys.executable} -c '{code}' store cat a:x 2>err | head -c 10; echo ${{PIPESTATUS[0]}} >code"
    run = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert len(run.stdout) == 10
    assert (tmp_path / "err").read_text() == ""
    assert (tmp_path / "code").read_text() == "1\n"


def test_a_full_disk_behind_the_pipe_is_said(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "a:x")
    code = "from reft_plugins.cli import main; main()"
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [sys.executable, "-c", code, "store", "cat", "a:x"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert run.returncode == 1
    assert b"standard output: cannot write: No space left" in run.stderr
    assert b"Traceback" not in run.stderr


def test_checkout_prints_the_folder(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "a:x")
    assert _run(checkout, "a:x").stdout.strip() == str(store.checkout("a:x"))
    assert json.loads(_run(checkout, "a:x", "--json").stdout)["folder"] == str(store.checkout("a:x"))


def test_a_copy_may_be_changed(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    store.add(adapters[0], "a:x")
    target = tmp_path / "deep" / "copy"
    assert _run(checkout, "a:x", "--to", target).stdout.strip() == str(target)
    assert sorted(os.listdir(target)) == ["adapter.json", "adapter.safetensors"]
    for name in os.listdir(target):
        assert (target / name).read_bytes() == (adapters[0] / name).read_bytes()
        assert os.access(target / name, os.W_OK)
    (target / "adapter.safetensors").write_bytes(b"changed")
    assert store.verify().ok
    assert os.listdir(tmp_path / "deep") == ["copy"]


def test_a_copy_overwrites_nothing(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    store.add(adapters[0], "a:x")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("file", "full", "link"):
        with pytest.raises(StoreError, match=f"{name}: is there already"):
            copy_out(store, "a:x", tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "full") == ["mine"]
    assert os.listdir(tmp_path / "empty") == []
    copy_out(store, "a:x", tmp_path / "empty")
    assert len(os.listdir(tmp_path / "empty")) == 2
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "link", "store"]


def test_a_damaged_version_leaves_no_copy(
    store: Store, adapters: list[Path], blob: Callable[[str, str], Path], tmp_path: Path
) -> None:
    store.add(adapters[0], "a:x")
    flip_bit(blob("a:x", "tensors"))
    with pytest.raises(StoreError, match="damaged"):
        copy_out(store, "a:x", tmp_path / "copy")
    assert os.listdir(tmp_path) == ["store"]


def test_usage_adds_up(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    variant = vary(adapters[0], tmp_path / "variant", "same tensors, other manifest")
    store.add(adapters[0], "a:x")
    store.add(variant, "a:x")
    store.add(adapters[0], "b:x")
    store.add(adapters[1], "c:x")
    store.attach("c:x", "application/vnd.reft.certificate.v1", {"c.json": ("application/json", b"{1}")})
    store.checkout("a:x")
    found = usage(store)

    on_disk = {path: path.stat() for path in store.root.rglob("*") if path.is_file()}
    blocks = sum(status.st_blocks for status in on_disk.values())
    assert found.total == Space(len(on_disk), sum(status.st_size for status in on_disk.values()), 512 * blocks)
    assert found.garbage == Space()
    assert found.checkouts.files == 2
    parts = found.blobs + found.garbage + found.checkouts + found.partial + found.other
    assert parts == found.total

    manifest, tensors = (
        (adapters[0] / "adapter.json").stat().st_size,
        (adapters[0] / "adapter.safetensors").stat().st_size,
    )
    images = {name: store.descriptor(name).size for name in ("a@v1", "a@v2", "b@v1", "c@v1")}
    by_name = {each.name: each for each in found.names}
    assert by_name["a"].versions == 2
    assert by_name["a"].unique.apparent == (variant / "adapter.json").stat().st_size + images["a@v2"]
    assert by_name["a"].shared.apparent == by_name["b"].shared.apparent == manifest + tensors + images["a@v1"]
    assert by_name["b"].unique == Space()
    assert by_name["c"].shared == Space()
    assert by_name["c"].unique.files == 3 + 3
    assert found.saved == manifest + 2 * tensors + images["a@v1"]  # b is a@v1 again, a@v2 has its tensors

    store.remove("c", force=True)
    (store.root / ".partial").mkdir(exist_ok=True)
    (store.root / ".partial" / "begun").write_bytes(b"12345")
    after = usage(store)
    assert after.garbage == by_name["c"].unique
    assert after.partial.apparent == 5
    assert store.gc(grace_seconds=0).bytes == by_name["c"].unique.apparent
    assert usage(store).garbage == Space()
    shutil.rmtree(store.root / "checkouts")
    assert usage(store).checkouts == Space()


def test_what_another_program_put_there_is_no_garbage(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "a:x")
    before = usage(store)
    manifest = b'{"schemaVersion":2,"layers":[]}'
    digest = store.blobs.put(manifest)
    assert usage(store).garbage.apparent == len(manifest)
    index = json.loads((store.root / "index.json").read_text())
    media_type = "application/vnd.oci.image.manifest.v1+json"
    index["manifests"].append({"mediaType": media_type, "digest": digest, "size": len(manifest)})
    (store.root / "index.json").write_text(json.dumps(index))
    assert usage(store).garbage == Space()
    assert usage(store).blobs.apparent == before.blobs.apparent + len(manifest)
    assert usage(store).names == before.names


def test_du_prints_it(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "a:x")
    store.add(adapters[0], "b:x")
    told = json.loads(_run(du, "--json").stdout)
    assert told["saved"] == told["names"][0]["shared"]["apparent"] > 2000
    lines = [line.split() for line in _run(du).stdout.splitlines()]
    assert lines[0] == ["NAME", "VERSIONS", "UNIQUE", "SHARED"]
    assert [line[0] for line in lines[1:3]] == ["a", "b"]
    assert next(line for line in lines if line[:1] == ["blobs"])[:2] == ["blobs", "3"]


def test_du_of_an_empty_store(store: Store) -> None:
    assert _run(du).exit_code == 0
    assert usage(store).names == ()
