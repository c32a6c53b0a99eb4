"""What the index and the history promise to readers without locks, beside other programs, copies, threads and forks."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from adapter_variants import vary

from adapters_store import Store
from adapters_store.layout import ledger
from adapters_store.layout.history import HISTORY_FILE, Tagged, encode
from adapters_store.layout.index import Index
from adapters_store.layout.ledger import Ledger
from reft_plugins.errors import AdapterError, StoreError


def _latest(index: Index) -> str:
    return index.names["sentiment"].tags["latest"].digest


class TestReaders:
    def test_a_line_that_was_read_and_taken_back(self, two_versions: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another one takes its place, as long as it was, at nearly the same moment."""
        reader = Ledger(two_versions.root)
        first, second = (two_versions.find(f"sentiment@v{number}").digest for number in (1, 2))
        seen: list[str] = []

        def fails(descriptor: int) -> None:
            seen.append(_latest(reader.read()))
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space"):
            patch.setattr(os, "fsync", fails)
            two_versions.tag("sentiment@v1", "latest")
        assert seen[0] == first, "the reader did not see what was taken back, so this tests nothing"
        assert _latest(reader.read()) == second
        two_versions.tag("sentiment@v1", "other1")
        assert _latest(reader.read()) == second
        assert "other1" in reader.read().names["sentiment"].tags

    def test_index_files_that_look_alike(self, two_versions: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same size and time, and an inode that comes back: the history tells them apart."""
        reader, original = Ledger(two_versions.root), ledger.replace_file

        def alike(path: Path, data: bytes, known: ledger.Stamp = None) -> bool:
            done = original(path, data, None)
            os.utime(path, ns=(10**18, 10**18))
            return done

        monkeypatch.setattr(ledger, "replace_file", alike)
        stamps = set()
        for count in range(40):
            two_versions.tag(f"sentiment@v{1 + count % 2}", "latest")
            assert _latest(reader.read()) == two_versions.find(f"sentiment@v{1 + count % 2}").digest
            stamps.add(
                (
                    os.stat(two_versions.root / "index.json").st_mtime_ns,
                    os.stat(two_versions.root / "index.json").st_size,
                )
            )
        assert len(stamps) < 10, "they do not look alike, so this tests nothing"

    def test_stores_that_change_places(self, two_versions: Store, adapters: list[Path], tmp_path: Path) -> None:
        other = Store.init(tmp_path / "other")
        other.add(adapters[2], "another:latest")
        assert two_versions.names() == ("sentiment",)
        aside = tmp_path / "aside"
        for expected in (("another",), ("sentiment",), ("another",)):
            two_versions.root.rename(aside)
            other.root.rename(two_versions.root)
            aside.rename(other.root)
            assert two_versions.names() == expected
            assert two_versions.verify().ok

    def test_following_is_like_reading_anew(self, two_versions: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger, "SMALL_INDEX_BYTES", 0)
        monkeypatch.setattr(ledger, "LARGEST_PART_BEHIND", 0)
        reader = Ledger(two_versions.root)
        reader.read()
        for count in range(20):
            two_versions.tag("sentiment@v1", f"tag{count}")
            assert two_versions._ledger.tail_bytes > 0
            assert reader.read().names == Ledger(two_versions.root).read().names == two_versions._index().names


class TestOtherPrograms:
    def test_one_that_writes_in_place(self, two_versions: Store) -> None:
        """What is met half written is looked at again."""
        path, stop, met = two_versions.root / "index.json", threading.Event(), 0
        text = path.read_bytes()

        def rewrite() -> None:
            while not stop.is_set():
                with path.open("r+b", buffering=0) as file:
                    file.truncate(0)
                    file.write(text[:300])
                    time.sleep(0.0005)
                    file.write(text[300:])
                time.sleep(0.02)

        thread = threading.Thread(target=rewrite)
        thread.start()
        try:
            count, until = 0, time.monotonic() + 20
            while (count < 200 or met == 0) and time.monotonic() < until:
                count += 1
                met += len(path.read_bytes()) < len(text)
                assert len(Ledger(two_versions.root).read().names["sentiment"].versions) == 2
        finally:
            stop.set()
            thread.join()
        assert met > 0, "never met half written"

    def test_one_that_writes_what_it_read_before(self, two_versions: Store, adapters: list[Path]) -> None:
        path = two_versions.root / "index.json"
        document = json.loads(path.read_bytes())
        two_versions.add(adapters[2], "sentiment:latest")
        two_versions.untag("sentiment:latest")
        document["manifests"].append({"mediaType": "a/b", "digest": "sha256:" + "1" * 64, "size": 1})
        path.write_text(json.dumps(document))
        assert [record.version for record in two_versions.list()] == [1, 2, 3]
        assert all(not record.tags for record in two_versions.list())
        two_versions.tag("sentiment@v1", "new")
        digests = [each["digest"] for each in json.loads(path.read_bytes())["manifests"]]
        assert "sha256:" + "1" * 64 in digests, "what the other program wrote is gone"
        assert len(digests) == 5

    def test_one_that_writes_while_we_do(self, two_versions: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        path, fsync, done = two_versions.root / "index.json", os.fsync, []

        def interrupted(descriptor: int) -> None:
            if "partial" in os.readlink(f"/proc/self/fd/{descriptor}") and not done:
                document = json.loads(path.read_bytes())
                document["manifests"].append({"mediaType": "a/b", "digest": "sha256:" + "1" * 64, "size": 1})
                path.write_text(json.dumps(document))
                done.append(1)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", interrupted)
        two_versions.tag("sentiment@v1", "new")
        assert done
        assert "1" * 64 in path.read_text()
        assert two_versions.find("sentiment:new").version == 1

    def test_one_that_drops_annotations(self, two_versions: Store) -> None:
        path = two_versions.root / "index.json"
        document = json.loads(path.read_bytes())
        del document["annotations"]
        path.write_text(json.dumps(document))
        before = two_versions.list()
        two_versions.remove("sentiment@v1")
        assert two_versions.list() == before[1:]
        assert two_versions.verify().ok


class TestHistoriesThatAreNotWhole:
    def test_deleted(self, two_versions: Store, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """What is added then is not lost either, even where `index.json` cannot be written."""
        before = two_versions.list()
        (two_versions.root / HISTORY_FILE).unlink()
        assert two_versions.list() == before
        assert [problem.where for problem in two_versions.verify().problems] == [HISTORY_FILE]
        original, writes = ledger.replace_file, []

        def full(path: Path, data: bytes, known: ledger.Stamp = None) -> bool:
            writes.append(path.name)
            if len(writes) > 1:
                raise StoreError("no space")
            return original(path, data, known)

        with monkeypatch.context() as patch, pytest.raises(StoreError, match="thereby made"):
            patch.setattr(ledger, "replace_file", full)
            two_versions.add(adapters[2], "sentiment")
        assert [each.version for each in Store(two_versions.root).list()] == [1, 2, 3]
        assert [each.version for each in two_versions.list()] == [1, 2, 3]
        assert len(Ledger(two_versions.root).read().names["sentiment"].versions) == 3
        two_versions.recover()
        assert [record.digest for record in two_versions.list()[:2]] == [record.digest for record in before]
        assert two_versions.verify().ok

    def test_a_copy_made_while_others_write(self, two_versions: Store, adapters: list[Path], tmp_path: Path) -> None:
        """It may lack what came meanwhile, but nothing in it is wrong once it is recovered."""
        stop = threading.Event()

        def write() -> None:
            for count in range(1000):
                if stop.is_set():
                    return
                two_versions.add(vary(adapters[0], tmp_path / "source", str(count)), "sentiment:latest")
                two_versions.remove(f"sentiment@v{count + 3}", force=True) if count % 3 == 0 else None

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for count in range(5):
                target = tmp_path / f"copy{count}"
                subprocess.run(["cp", "-r", two_versions.root, target], check=False, capture_output=True)
                copy = Store.open(target)
                copy.recover()
                assert {record.version for record in copy.list()} >= {1, 2}
                missing = [problem for problem in copy.verify().problems if "missing" not in problem.what]
                assert missing == []
        finally:
            stop.set()
            thread.join()

    def test_recovering_does_not_bring_back_what_was_removed(self, two_versions: Store) -> None:
        two_versions.remove("sentiment@v1")
        two_versions.gc(grace_seconds=0)
        path = two_versions.root / HISTORY_FILE
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b"remove", b"rewove"))
        assert not two_versions.verify().ok
        two_versions.recover()
        assert [record.version for record in two_versions.list()] == [2]
        assert two_versions.verify().ok

    def test_recovering_from_nothing_is_refused(self, two_versions: Store) -> None:
        """The next `gc` would take every blob for garbage."""
        index, history = two_versions.root / "index.json", two_versions.root / HISTORY_FILE
        kept = index.read_bytes()
        index.write_bytes(b"")
        history.unlink()
        with pytest.raises(StoreError, match="backup"):
            two_versions.recover()
        with pytest.raises(StoreError):
            two_versions.gc(grace_seconds=0)
        index.write_bytes(kept)
        two_versions.recover()
        assert [record.version for record in two_versions.list()] == [1, 2]
        assert two_versions.verify().ok

    def test_what_cannot_be_read_again_is_never_written(
        self, two_versions: Store, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        half = "\ud800"
        source = vary(adapters[2], tmp_path / "half", half)
        with pytest.raises(AdapterError, match="surrogates"):
            two_versions.add(source, "sentiment")
        monkeypatch.setenv("REFT_AUTHOR", os.fsdecode(b"caf\xe9"))
        two_versions.tag("sentiment@v1", "mine")
        assert two_versions.history()[-1].by == "caf?"
        with pytest.raises(StoreError, match="nobody could read"):
            encode([Tagged("sentiment", half, 1, "sha256:" + "0" * 64)])
