"""Waiting adapters are named once, read in the background, and whatever is wrong with them harms nothing."""

from __future__ import annotations

import gc
import shutil
import threading
from itertools import count
from types import SimpleNamespace

import pytest
from strong_adapters import strong_loreft

from reft_vllm import admission, prefetch
from reft_vllm.admission import KEPT, serve_base
from reft_vllm.prefetch import Announcer, Prefetcher


def waiting(*paths: str | None) -> list[SimpleNamespace]:
    loras = [None if path is None else SimpleNamespace(lora_path=path) for path in paths]
    return [SimpleNamespace(lora_request=lora) for lora in loras]


def version(letter: str) -> str:
    return f"/adapters/{letter}#sha256:{letter * 64}"


def test_an_adapter_is_named_when_it_begins_and_ends_to_wait_in_the_window() -> None:
    announcer = Announcer(window=3)
    a, b, c = map(version, "abc")
    assert announcer.of(waiting(a, None, "/somebody/elses/lora", b)) == ((a,), ())
    assert announcer.of(waiting(a, a, b, c)) == ((b,), ())
    assert announcer.of(waiting(b, c)) == ((c,), (a,))
    new, gone = announcer.of(waiting("/somebody/elses/lora"))
    assert new == () and set(gone) == {b, c}
    assert announcer.of(waiting(b)) == ((b,), ()), "it waits again, and may be gone from memory by now"


def test_no_more_of_the_queue_is_looked_at_than_the_window() -> None:
    looked = count()

    def endless():
        for _ in looked:
            yield from waiting(None)

    assert Announcer(window=5).of(endless()) == ((), ())
    assert next(looked) <= 6


@pytest.fixture
def paths(tiny_llama, tmp_path):
    """Exact LoRA paths of adapters that this process has not read."""
    serve_base(str(tiny_llama))
    directories = [strong_loreft(tiny_llama, "f1", seed=seed).save(tmp_path / str(seed)) for seed in range(3)]
    found = [str(admission.exact(str(directory))) for directory in directories]
    KEPT.clear()
    return found


def test_what_was_read_ahead_is_in_memory(paths) -> None:
    ahead = Prefetcher()
    before = KEPT.reads
    ahead.ask(paths)
    ahead.join()
    assert (ahead.read, ahead.failed, KEPT.reads - before) == (3, 0, 3)
    for path in paths:
        assert admission.admit(path).program.edits
    ahead.ask(paths)
    ahead.join()
    assert (ahead.read, KEPT.reads - before) == (3, 3), "nothing was read again"


def test_broken_adapters_stop_nothing_and_are_refused_when_their_turn_comes(paths) -> None:
    directory = paths[1].partition("#")[0]
    shutil.rmtree(directory)
    ahead = Prefetcher()
    ahead.ask(["/nowhere#sha256:" + "0" * 64, *paths])
    ahead.join()
    assert (ahead.read, ahead.failed) == (2, 2)
    assert admission.admit(paths[2]).program.edits
    with pytest.raises(admission.AdapterError):
        admission.admit(paths[1])
    KEPT.clear()
    ahead.ask(paths[:1])
    ahead.join()
    assert ahead.read == 3, "the thread lives on"


def test_what_waits_is_held_though_the_cache_is_small(paths, monkeypatch) -> None:
    monkeypatch.setattr(KEPT, "limit", 2)
    ahead = Prefetcher()
    ahead.ask(paths[:2])
    ahead.join()
    assert ahead.read == 1, "the second would take more than half of what may be kept"
    before = KEPT.reads
    admission.admit(paths[2])
    assert KEPT.reads - before == 1, "the cache has room for this one only"
    assert admission.admit(paths[0]).program.edits
    assert KEPT.reads - before == 1, "it was held"
    ahead.ask([], gone=paths[:1])
    ahead.join()
    assert ahead.read == 2, "its turn came, the next is read"
    ahead.ask([])
    gc.collect()
    admission.admit(paths[0])
    assert KEPT.reads - before == 3, "after its turn nobody holds it"


def test_asking_never_waits(monkeypatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    admitted = SimpleNamespace(manifest=SimpleNamespace(tensors=SimpleNamespace(size=1)))

    def slow(path: str) -> SimpleNamespace:
        begun.set()
        assert go_on.wait(20)
        return admitted

    monkeypatch.setattr(prefetch, "admit", slow)
    ahead = Prefetcher(queued=2)
    ahead.ask(["a"])
    assert begun.wait(20)
    ahead.ask(["b", "c", "d", "e"])
    assert (ahead.asked, ahead.dropped, ahead.read) == (5, 2, 0)
    ahead.ask([], gone=["a", "b"])
    assert ahead.late == 1, "nobody wants them any more"
    go_on.set()
    ahead.join()
    assert list(ahead._held) == ["c"]
    assert ahead.read == 2
