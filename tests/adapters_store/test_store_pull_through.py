from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store import Store, pull_through
from adapters_store.layout.locks import locked
from adapters_store.looked_up import Answer, Memory
from adapters_store.remotes.folder import Folder
from adapters_store.remotes.remote import UnreachableError
from adapters_store.resolve import resolve
from reft_plugins.errors import StoreError, UnknownReferenceError, UntrustedError, VersionConflictError

FAR = "oci://far.example/team"
POLICY = '[trust]\npolicy = "policy.toml"\n'


class Watched(Folder):
    """Another store in the place of a registry, that counts what it is asked and can be down."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.asked: list[str] = []
        self.blobs = 0
        self.down = False

    @property
    def address(self) -> str:
        return FAR

    def descriptor(self, name: str, reference: str) -> Any:
        self.asked.append(f"{name}:{reference}")
        if self.down:
            raise UnreachableError(f"{FAR}: no answer within 5 s. Try again")
        return super().descriptor(name, reference)

    def pull_blob(self, *arguments: Any) -> None:
        self.blobs += 1
        super().pull_blob(*arguments)


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """What is at `FAR`."""
    remote = Watched(Store.init(tmp_path / "far"))
    original = pull_through._source
    monkeypatch.setattr(pull_through, "_source", lambda address: remote if address == FAR else original(address))
    return remote


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    yield
    pull_through._resting.clear()
    pull_through._unknown.clear()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """The private key whose signature `POLICY` demands."""
    from adapters_store.trust.keys import generate

    private, public = generate(tmp_path / "key.pem")
    (tmp_path / "policy.toml").write_text(f'[[rules]]\nnames = ["sentiment"]\nkeys = ["{public.name}"]\n')
    return private


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the configuration; the default store is not there yet."""
    monkeypatch.setenv("REFT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "near"))

    def write(*remotes: str, refresh: str = '"never"', policy: str = "") -> None:
        listed = ", ".join(f'"{each}"' for each in remotes)
        (tmp_path / "config.toml").write_text(f"[store]\nremotes = [{listed}]\nrefresh = {refresh}\n{policy}")

    write(FAR)
    return write


def _near(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "near")


def test_what_is_missing_is_pulled_once(far: Watched, configure: Any, adapters: list[Path], tmp_path: Path) -> None:
    record = far.store.add(adapters[0], "sentiment:prod")
    path = resolve("sentiment:prod")
    assert path is not None
    assert path.parent.parent == tmp_path / "near"
    assert (path / "adapter.safetensors").read_bytes() == (adapters[0] / "adapter.safetensors").read_bytes()
    assert _near(tmp_path).find("sentiment:prod").digest == record.digest
    assert _near(tmp_path).find("sentiment:prod").version == 1
    asked = len(far.asked)
    assert asked > 0 and far.blobs == 2
    for reference in ("sentiment:prod", "sentiment@v1", "sentiment:v1", f"sentiment@{record.digest}"):
        assert resolve(reference) == path
    assert len(far.asked) == asked
    assert _near(tmp_path).verify().ok


@pytest.mark.parametrize("form", ["@v2", ":v2", "@digest"])
def test_a_version_is_pulled_under_its_number(
    far: Watched, configure: Any, adapters: list[Path], tmp_path: Path, form: str
) -> None:
    far.store.add(adapters[0], "sentiment:old")
    second = far.store.add(adapters[1], "sentiment:prod")
    assert resolve("sentiment" + form.replace("digest", second.digest)) is not None
    assert [(each.reference, each.tags) for each in _near(tmp_path).list()] == [("sentiment@v2", ())]


def test_without_remotes_nothing_is_asked(far: Watched, configure: Any, adapters: list[Path], tmp_path: Path) -> None:
    far.store.add(adapters[0], "sentiment:prod")
    configure()
    assert resolve("sentiment:prod") is None
    assert resolve("owner/model") is None
    configure(FAR)
    for text in ("sentiment", "owner/model", "./x:y", "Owner/Model:x", str(tmp_path)):
        assert resolve(text) is None
    assert far.asked == []
    assert not (tmp_path / "near").exists()


def test_remotes_are_asked_in_order(far: Watched, configure: Any, adapters: list[Path], tmp_path: Path) -> None:
    first = Store.init(tmp_path / "first")
    first.add(adapters[0], "both:x")
    far.store.add(adapters[1], "both:x")
    far.store.add(adapters[2], "later:x")
    configure(str(tmp_path / "first"), FAR)
    resolve("both:x")
    assert far.asked == []
    resolve("later:x")
    assert _near(tmp_path).find("both:x").digest == first.find("both:x").digest
    assert _near(tmp_path).find("later:x").digest == far.store.find("later:x").digest


def test_what_nobody_has_names_everybody(far: Watched, configure: Any, tmp_path: Path) -> None:
    configure(str(tmp_path / "missing-store"), FAR, "hf://owner/other")
    with pytest.raises(
        StoreError, match=rf"nothing:x: not in the store .*near.*missing-store.*{FAR}.*hf://owner/other"
    ):
        resolve("nothing:x")
    configure(FAR, "hf://owner/other")
    with pytest.raises(UnknownReferenceError, match=rf"nothing:x: neither .*near.* {FAR}, hf://owner/other"):
        resolve("nothing:x")
    asked = len(far.asked)
    with pytest.raises(UnknownReferenceError, match=FAR):
        resolve("nothing:x")
    assert len(far.asked) == asked  # believed for some seconds
    assert [path.name for path in (tmp_path / "near" / "lookups").iterdir() if not path.name.startswith("lock-")] == []


def test_an_unknown_reference_is_asked_for_again_later(
    far: Watched, configure: Any, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_through, "UNKNOWN_SECONDS", 0.0)
    with pytest.raises(UnknownReferenceError):
        resolve("late:x")
    far.store.add(adapters[0], "late:x")
    assert resolve("late:x") is not None


def test_a_remote_that_is_down(far: Watched, configure: Any, adapters: list[Path], tmp_path: Path) -> None:
    far.store.add(adapters[0], "sentiment:prod")
    far.down = True
    with pytest.raises(StoreError, match=rf"sentiment:prod: not in the store .*{FAR}: no answer within 5 s"):
        resolve("sentiment:prod")
    far.down = False
    path = resolve("sentiment:prod")
    configure(FAR, refresh='"always"')
    far.down = True
    with pytest.warns(RuntimeWarning, match="sentiment:prod stays sentiment@v1: .*no answer"):
        assert resolve("sentiment:prod") == path
    asked = len(far.asked)
    assert resolve("sentiment:prod") == path  # a resting remote is not asked, and nobody is warned again
    assert len(far.asked) == asked


def test_another_remote_helps_where_one_is_down(
    far: Watched, configure: Any, adapters: list[Path], tmp_path: Path
) -> None:
    far.down = True
    second = Store.init(tmp_path / "second")
    second.add(adapters[0], "sentiment:prod")
    configure(FAR, str(tmp_path / "second"), refresh='"always"')
    assert resolve("sentiment:prod") is not None
    second.add(adapters[1], "sentiment:prod")
    with pytest.warns(RuntimeWarning, match="stays sentiment@v1"):
        resolve("sentiment:prod")  # what a later remote says does not replace what is here
    assert _near(tmp_path).find("sentiment:prod").version == 1


@pytest.mark.parametrize(
    ("refresh", "moves"), [('"never"', False), ('"always"', True), ("3600", False), ("0.05", True)]
)
def test_when_a_tag_follows(
    far: Watched, configure: Any, adapters: list[Path], tmp_path: Path, refresh: str, moves: bool
) -> None:
    configure(FAR, refresh=refresh)
    far.store.add(adapters[0], "sentiment:prod")
    before = resolve("sentiment:prod")
    far.store.add(adapters[1], "sentiment:prod")
    time.sleep(0.06)
    assert (resolve("sentiment:prod") != before) is moves
    near = _near(tmp_path)
    assert near.find("sentiment:prod").version == (2 if moves else 1)
    asked = len(far.asked)
    assert resolve("sentiment@v1") == before
    assert len(far.asked) == asked


def test_a_tag_that_did_not_move_costs_one_question(far: Watched, configure: Any, adapters: list[Path]) -> None:
    configure(FAR, refresh='"always"')
    far.store.add(adapters[0], "sentiment:prod")
    path = resolve("sentiment:prod")
    for _ in range(3):
        far.asked.clear()
        assert resolve("sentiment:prod") == path
        assert far.asked == ["sentiment:prod"]


def test_nobody_waits_for_a_look_while_there_is_something_to_use(
    far: Watched, configure: Any, adapters: list[Path], tmp_path: Path
) -> None:
    configure(FAR, refresh='"always"')
    far.store.add(adapters[0], "sentiment:prod")
    path = resolve("sentiment:prod")
    far.store.add(adapters[1], "sentiment:prod")
    asked = len(far.asked)
    with locked(Memory(tmp_path / "near").lock_path("sentiment:prod")):
        assert resolve("sentiment:prod") == path
        assert len(far.asked) == asked
    assert resolve("sentiment:prod") != path


def test_a_tag_of_this_machine_alone_stays(far: Watched, configure: Any, adapters: list[Path], tmp_path: Path) -> None:
    Store.init(tmp_path / "near").add(adapters[0], "mine:x")
    configure(FAR, refresh="3600")
    path = resolve("mine:x")
    assert path == resolve("mine:x")
    assert far.asked == ["mine:x"]


def test_an_answer_from_the_future_is_out_of_date() -> None:
    assert Answer(time.time() + 1000, None).older_than(60)
    assert Answer(time.time() - 61, None).older_than(60)
    assert not Answer(time.time() - 1, None).older_than(60)


def test_answers_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.note("a:x", "sha256:" + "1" * 64)
    answer = memory.recall("a:x")
    assert answer is not None and answer.digest == "sha256:" + "1" * 64
    [path] = (tmp_path / "lookups").iterdir()
    for content in ("", "[]", "{}", '{"at":"x","digest":null}', "[" * 3000, "x" * 9999):
        path.write_text(content)
        assert memory.recall("a:x") is None
    assert memory.recall("b:x") is None


def test_a_number_that_is_taken_is_said(far: Watched, configure: Any, adapters: list[Path], tmp_path: Path) -> None:
    near = Store.init(tmp_path / "near")
    near.add(adapters[0], "sentiment:mine")
    far.store.add(adapters[1], "sentiment:prod")
    with pytest.raises(VersionConflictError, match=r"sentiment:prod: .*--as NAME.*--renumber.*reft store pull"):
        resolve("sentiment:prod")
    assert [each.tags for each in near.list()] == [("mine",)]


def test_many_at_once_pull_once(far: Watched, configure: Any, adapters: list[Path], tmp_path: Path) -> None:
    far.store.add(adapters[0], "sentiment:prod")
    Store.init(tmp_path / "near")
    found: list[Path | None] = []
    threads = [threading.Thread(target=lambda: found.append(resolve("sentiment:prod"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert far.blobs == 2
    assert far.asked.count("sentiment:prod") == 1


def test_many_at_once_ask_once_for_what_is_unknown(far: Watched, configure: Any, tmp_path: Path) -> None:
    Store.init(tmp_path / "near")
    refused: list[UnknownReferenceError] = []

    def ask() -> None:
        try:
            resolve("nothing:x")
        except UnknownReferenceError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 8
    assert far.asked == ["nothing:x"]


def test_many_processes_pull_once(configure: Any, adapters: list[Path], tmp_path: Path) -> None:
    source = Store.init(tmp_path / "source")
    source.add(adapters[0], "sentiment:prod")
    configure(str(tmp_path / "source"))
    code = (
        "from adapters_store.remotes.folder import Folder\nfrom adapters_store.resolve import resolve\n"
        "original = Folder.pull_blob\n"
        "def counted(*arguments):\n    print('blob')\n    return original(*arguments)\n"
        "Folder.pull_blob = counted\nassert resolve('sentiment:prod').is_dir()\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert "".join(outputs).count("blob") == 2


def test_a_read_only_store_still_answers(
    far: Watched, configure: Any, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.init(tmp_path / "near").add(adapters[0], "sentiment:prod")
    path = resolve("sentiment:prod")
    configure(FAR, refresh='"always"')

    def refuse(*arguments: Any) -> None:
        raise StoreError("near: cannot make the folder: Read-only file system")

    monkeypatch.setattr("adapters_store.looked_up.ensure_directory", refuse)
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        assert resolve("sentiment:prod") == path


def test_what_was_pulled_is_held_to_the_policy(
    far: Watched, configure: Any, adapters: list[Path], key: Path, tmp_path: Path
) -> None:
    from adapters_store.trust.signing import sign

    configure(FAR, refresh='"always"', policy=POLICY)
    far.store.add(adapters[0], "sentiment:prod")
    with pytest.raises(UntrustedError):
        resolve("sentiment:prod")
    assert _near(tmp_path).find("sentiment@v1").tags == ()
    far.store.add(adapters[1], "sentiment:prod")
    sign(far.store, "sentiment@v2", key)
    path = resolve("sentiment:prod")
    assert path is not None and path.name.endswith(far.store.find("sentiment@v2").digest[7:])
    far.store.add(adapters[2], "sentiment:prod")
    with pytest.warns(RuntimeWarning, match="sentiment:prod stays sentiment@v2"):
        assert resolve("sentiment:prod") == path
    assert _near(tmp_path).find("sentiment:prod").version == 2
    with pytest.raises(UntrustedError):
        resolve("sentiment@v3")
    with pytest.raises(UntrustedError):
        resolve(f"{FAR}/sentiment:prod")
    assert resolve(f"{FAR}/sentiment@v2") == path


@pytest.mark.parametrize(
    "reference", ["sentiment:prod", "sentiment@v1", f"{FAR}/sentiment:prod", f"{FAR}/sentiment@v1"]
)
def test_what_is_signed_later_is_admitted_then(
    far: Watched,
    configure: Any,
    adapters: list[Path],
    key: Path,
    tmp_path: Path,
    reference: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from adapters_store.trust.signing import sign

    far.store.add(adapters[0], "sentiment:prod")
    assert resolve(reference) is not None
    configure(FAR, policy=POLICY)
    with pytest.raises(UntrustedError):
        resolve(reference)
    asked = len(far.asked)
    sign(far.store, "sentiment@v1", key)
    if not reference.startswith(FAR):
        with pytest.raises(UntrustedError):
            resolve(reference)
        assert len(far.asked) == asked  # not asked again within some seconds
    monkeypatch.setattr(pull_through, "_unknown", {})
    assert resolve(reference) is not None
    far.down = True
    asked = len(far.asked)
    assert resolve(f"sentiment@{far.store.find('sentiment@v1').digest}") is not None
    assert len(far.asked) == asked


def test_an_address_is_asked_for_where_it_says(
    far: Watched, configure: Any, adapters: list[Path], tmp_path: Path
) -> None:
    configure()
    first = far.store.add(adapters[0], "sentiment:prod")
    path = resolve(f"{FAR}/sentiment:prod")
    near = _near(tmp_path)
    assert near.find("sentiment@v1").digest == first.digest
    assert near.find("sentiment@v1").tags == ()  # no tag of this store moves
    second = far.store.add(adapters[1], "sentiment:prod")
    moved = resolve(f"{FAR}/sentiment:prod")
    assert moved is not None and moved != path and moved.name.endswith(second.digest[7:])
    far.down = True
    with pytest.warns(RuntimeWarning, match="what it meant last"):
        assert resolve(f"{FAR}/sentiment:prod") == moved
    with pytest.raises(UnreachableError):
        resolve(f"{FAR}/sentiment:other")
    far.down = False
    with pytest.raises(UnknownReferenceError, match=r"other.* It has: prod, v1, v2"):
        resolve(f"{FAR}/sentiment:other")
    with pytest.raises(UnknownReferenceError, match=r"sentiment:TAG"):
        resolve(f"{FAR}/sentiment")
    with pytest.raises(StoreError):
        resolve("oci://")


@pytest.mark.parametrize("form", ["@v1", "@digest", ":v1"])
def test_an_exact_address_is_asked_for_once(
    far: Watched, configure: Any, adapters: list[Path], tmp_path: Path, form: str
) -> None:
    record = far.store.add(adapters[0], "sentiment:prod")
    Store.init(tmp_path / "near").add(adapters[1], "sentiment:mine")  # another version 1
    text = f"{FAR}/sentiment{form.replace('digest', record.digest)}"
    path = resolve(text)
    assert path is not None and path.name.endswith(record.digest[7:])
    asked = len(far.asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(text) == path
    assert len(far.asked) == asked
    assert _near(tmp_path).find("sentiment@v1").tags == ("mine",)


def test_every_command_gets_it_through_the_core(
    far: Watched, configure: Any, adapters: list[Path], tmp_path: Path
) -> None:
    import reft_plugins as reft

    far.store.add(adapters[0], "sentiment:prod")
    assert reft.load("sentiment:prod").digest == reft.load(adapters[0]).digest
    assert reft.load(f"{FAR}/sentiment:prod").digest == reft.load(adapters[0]).digest
