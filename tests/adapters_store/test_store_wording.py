"""What the store says where something is missing or impossible."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapters_store import Store
from adapters_store.commands import store as group
from adapters_store.layout.files import explained
from adapters_store.wording import counted, figure
from reft_plugins.errors import StoreError, UnknownReferenceError


def test_counted() -> None:
    assert [counted(number, "version") for number in (0, 1, 2)] == ["0 versions", "1 version", "2 versions"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (55040.0, "55040"),
        (0.0112177, "0.01122"),
        (-2.5, "-2.5"),
        (1e300, "1e+300"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "reft store gc"), (errno.EROFS, "--store"), (errno.EACCES, "Whoever owns it can allow it")],
)
def test_errors_of_the_disk_say_what_helps(number: int, advice: str) -> None:
    with pytest.raises(StoreError) as caught, explained("write", Path("there")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"there: cannot write: {os.strerror(number)}. ")
    assert advice in str(caught.value)


def test_a_damaged_index_names_what_repairs_it(two_versions: Store) -> None:
    index = two_versions.root / "index.json"
    whole = index.read_bytes()
    for damage in (lambda: index.write_bytes(whole[:-1]), index.unlink):
        damage()
        with pytest.raises(StoreError, match=r"index\.json: .*`reft store recover` makes it anew"):
            two_versions.list()
        report = CliRunner().invoke(group, ["verify"])
        assert report.exit_code == 1
        assert "reft store recover" in report.stdout
        assert "index.json: index.json" not in report.stdout
        two_versions.recover()
        assert [record.reference for record in two_versions.list()] == ["sentiment@v1", "sentiment@v2"]


def test_a_store_that_lost_its_marker_gets_it_again(two_versions: Store) -> None:
    two_versions.checkout("sentiment@v1")
    (two_versions.root / "index.json.damaged-1").write_text("{")
    (two_versions.root / "oci-layout").unlink()
    with pytest.raises(StoreError, match="reft store init"):
        Store.open()
    (two_versions.root / "letter.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"'letter\.txt'"):
        Store.init()
    (two_versions.root / "letter.txt").unlink()
    assert [record.reference for record in Store.init().list()] == ["sentiment@v1", "sentiment@v2"]
    assert Store.open().verify().ok


def test_a_name_whose_versions_are_gone_is_not_offered(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "topic:latest")
    store.remove("sentiment", force=True)
    for reference in ("sentiment:latest", "sentiment@v1", "nothing:latest"):
        with pytest.raises(UnknownReferenceError, match="the store has no .* It has: topic$"):
            store.find(reference)
    assert repr(store) == f"Store({str(store.root)!r})"
