"""The page of a store that is damaged, changes meanwhile or is asked too much; and the command that serves it."""

from __future__ import annotations

import html
import json
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import httpx
import pytest
from adapter_variants import flip_bit, vary
from click.testing import CliRunner
from page_server import served

from adapters_store import Store
from adapters_store.commands import store as group
from adapters_store.web import differences, selection
from reft_plugins.errors import StoreError


@pytest.fixture
def page(store: Store, adapters: list[Path]) -> Iterator[httpx.Client]:
    """The page of a store of its own, with two versions of `a` and one of `b`."""
    for number in range(2):
        store.add(adapters[number], "a:latest")
    store.add(adapters[2], "b:latest")
    with served(store) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def _told(answer: httpx.Response) -> str:
    assert "Traceback" not in answer.text
    assert "<html" in answer.text
    return html.unescape(answer.text)


def test_a_damaged_version_is_told_and_the_others_are_shown(page: httpx.Client, store: Store) -> None:
    config = store.show("a@v1").image_manifest["config"]["digest"]
    blob = store.blobs.path(config)
    flip_bit(blob)
    for path in ("/adapters/a@v1", "/fidelity/a@v1", "/lineage/a@v1"):
        answer = page.get(path)
        assert answer.status_code == 500, path
        assert config[7:20] in _told(answer)
    difference = page.get("/diff?a=a@v1&b=a@v2")
    assert difference.status_code == 422
    assert config[7:20] in _told(difference)
    assert "error" in page.get("/api/adapters/a@v1").json()
    for path in ("/", "/adapters/a", "/adapters/a@v2", "/adapters/b@v1"):
        assert page.get(path).status_code == 200
    flip_bit(blob)
    assert page.get("/adapters/a@v1").status_code == 200


def test_damaged_tensors_are_told_where_they_are_read(page: httpx.Client, store: Store) -> None:
    tensors = store.show("a@v1").image_manifest["layers"][0]["digest"]
    flip_bit(store.blobs.path(tensors))
    assert page.get("/adapters/a@v1").status_code == 200
    answer = page.get("/diff?a=a@v1&b=a@v2")
    assert answer.status_code == 422
    assert tensors[7:20] in _told(answer)


def test_a_damaged_store_is_told_and_served_again_when_it_is_sound(page: httpx.Client, store: Store) -> None:
    index = store.root / "index.json"
    sound = index.read_bytes()
    for damage in (b"{", b"", b"[]", sound[:-1]):
        index.unlink()
        index.write_bytes(damage)
        for path in ("/", "/adapters/a", "/metrics/a", "/diff?a=a"):
            answer = page.get(path)
            assert answer.status_code == 500, (damage[:10], path)
            assert "index.json" in _told(answer)
        assert "index.json" in page.get("/api/adapters").json()["error"]
        assert page.get("/static/style.css").status_code == 200
    index.unlink()
    index.write_bytes(sound)
    assert page.get("/adapters/a").status_code == 200


def test_errors_of_the_program_go_to_the_log(
    page: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Store, "show", fail)
    for _ in range(20):
        answer = page.get("/adapters/a@v1")
        assert answer.status_code == 500
        assert "RuntimeError" in _told(answer)
        assert "secret" not in answer.text
        assert "frame-ancestors" in answer.headers["content-security-policy"]
    assert "secret" in caplog.text
    monkeypatch.undo()
    assert page.get("/adapters/a@v1").status_code == 200


def test_what_changes_is_seen_at_once(page: httpx.Client, store: Store, adapters: list[Path], tmp_path: Path) -> None:
    assert page.get("/adapters/new").status_code == 404
    store.add(vary(adapters[0], tmp_path / "new", "new"), "new:x")
    assert "new@v1" in page.get("/adapters/new").text
    store.tag("a@v1", "moved")
    assert "moved" in page.get("/adapters/a@v1").text
    assert "moved" not in page.get("/adapters/a@v2").text
    store.remove("b@v1", force=True)
    assert page.get("/adapters/b@v1").status_code == 404


def test_many_readers_and_a_writer(page: httpx.Client, store: Store, adapters: list[Path], tmp_path: Path) -> None:
    paths = ["/", "/adapters/a", "/diff?a=a@v1&b=a@v2", "/lineage/a", "/adapters/b@v1", "/pictures/diff?a=a@v1&b=a@v2"]
    done = threading.Event()

    def write() -> int:
        number = 0
        while not done.is_set():
            number += 1
            store.add(vary(adapters[0], tmp_path / str(number), str(number)), "busy:latest")
        return number

    with ThreadPoolExecutor(9) as pool:
        writer = pool.submit(write)
        answers = list(pool.map(lambda path: page.get(path).status_code, paths * 10))
        done.set()
        assert writer.result(60) > 0
    assert set(answers) == {200}


@contextmanager
def running(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`reft store serve` with its first line of output."""
    program = [
        sys.executable,
        "-c",
        "from reft_plugins.cli import main; main()",
        "store",
        "serve",
        *map(str, arguments),
    ]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            with selectors.DefaultSelector() as watched:
                watched.register(process.stdout, selectors.EVENT_READ)
                assert watched.select(60), "said nothing"
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_the_command(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "a:latest")
    with running("--port", 0, "--store", store.root, "--json") as (process, line):
        url = json.loads(line)["url"]
        assert url.startswith("http://127.0.0.1:")
        assert "a@v1" in httpx.get(f"{url}adapters/a", trust_env=False).text
        taken = CliRunner().invoke(group, ["serve", "--port", url.rstrip("/").rpartition(":")[2]])
        assert isinstance(taken.exception, StoreError)
        assert "--port" in str(taken.exception)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")


def test_who_opens_the_page_to_all_is_warned(store: Store) -> None:
    with running("--host", "0.0.0.0", "--port", 0, "--store", store.root) as (process, line):
        port = line.strip().rstrip("/").rpartition(":")[2]
        answer = httpx.get(f"http://127.0.0.1:{port}/", headers={"Host": "any.example"}, trust_env=False)
        assert answer.status_code == 200
        process.send_signal(signal.SIGINT)
        assert "no login" in process.communicate(timeout=30)[1]


@pytest.mark.parametrize("arguments", [("--port", "65536"), ("--port", "x"), ("--port", "-1"), ("what",)])
def test_wrong_use(store: Store, arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(group, ["serve", *arguments]).exit_code == 2


def test_no_address_and_no_store(store: Store, tmp_path: Path) -> None:
    for arguments, told in (
        (("--host", "nowhere.invalid"), "cannot listen on nowhere.invalid"),
        (("--store", tmp_path / "none"), "reft store init"),
    ):
        result = CliRunner().invoke(group, ["serve", *map(str, arguments)])
        assert isinstance(result.exception, StoreError)
        assert told in str(result.exception)


def test_help_loads_no_server() -> None:
    program = (
        "import sys; from adapters_store.commands import store; store.main(['serve', '--help'], standalone_mode=False);"
        "heavy = {'fastapi', 'uvicorn', 'starlette', 'jinja2', 'matplotlib', 'torch', 'pydantic'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "--port" in result.stdout


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no loopback address of IPv6")
def test_loopback_of_ipv6(store: Store) -> None:
    with running("--host", "::1", "--port", 0, "--store", store.root, "--json") as (_, line):
        url = json.loads(line)["url"]
        assert url.startswith("http://[::1]:")
        assert httpx.get(url, trust_env=False).status_code == 200
        assert httpx.get(url, headers={"Host": "evil.example"}, trust_env=False).status_code == 400


def test_many_versions_of_one_name(
    page: httpx.Client, store: Store, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "MAX_OPTIONS", 10)
    for number in range(60):
        store.add(vary(adapters[0], tmp_path / str(number), str(number)), f"long:tag{number}")
    first, second = (page.get("/adapters/long", params={"page": number}).text for number in (1, 2))
    assert 'href="/adapters/long@v60"' in first
    assert 'href="/adapters/long@v11"' in first
    assert first.count("<td><span class=") == 50 + 60  # versions, and all tags
    assert 'href="/adapters/long?page=2" rel="next"' in first
    assert second.count("<td><span class=") == 10 + 60
    assert 'href="/adapters/long@v1"' in second
    assert page.get("/adapters/long?page=99").text == second
    difference = page.get("/diff?a=long@v1&b=long@v60").text
    assert difference.count("<option ") == 11 + 10
    assert '<option value="long@v1" selected>' in difference
    assert len(page.get("/api/adapters/long").json()["versions"]) == 60


def test_what_the_policy_says_is_told(page: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned() -> str:
        answer = page.get("/adapters/a@v1")
        assert answer.status_code == 200
        found = re.findall('class="note warning">([^<]*)<', answer.text)
        return html.unescape(found[0]) if found else ""

    assert warned() == ""
    policy = tmp_path / "policy.toml"
    monkeypatch.setenv("REFT_POLICY", str(policy))
    for text, told in (
        ('default = "refuse"', "does not admit this version"),
        ('default = "allow"', ""),
        ('[[rules]]\nnames = ["b"]\nallow_unsigned = true', "does not admit this version"),
        ("default = 3", "policy.toml"),
    ):
        policy.write_text(text)
        assert told in warned() if told else warned() == "", text
    assert page.get("/diff?a=a@v1&b=a@v2").status_code == 200


def test_comparisons_do_not_keep_other_pages_waiting(page: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        started.set()
        assert go_on.wait(60)
        raise StoreError("slow")

    monkeypatch.setattr(differences, "_compared", slow)
    path = "/diff?a=a@v1&b=a@v2"
    with ThreadPoolExecutor(2 * differences.MAX_WAITING) as pool:
        answers = [pool.submit(page.get, path) for _ in range(2 * differences.MAX_WAITING)]
        assert started.wait(30)
        refused = [each.result() for each in islice(as_completed(answers, timeout=30), differences.MAX_WAITING)]
        assert all("comparisons wait for each other" in _told(answer) for answer in refused)
        assert page.get("/adapters/a").status_code == 200
        go_on.set()
        assert sum("slow" in _told(each.result()) for each in answers) == differences.MAX_WAITING
