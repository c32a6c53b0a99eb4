"""The page as any program sees it: answers, headers, errors, and that nothing changes."""

from __future__ import annotations

import hashlib
import html
import re
from collections import deque
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from page_stores import ACCURACIES, MANY, SCRIPT

from adapters_store import Store

PAGES = (
    "/",
    "/?metric=accuracy%3E%3D0.9",
    "/adapters/sentiment",
    "/adapters/sentiment@v3",
    "/adapters/sentiment:production",
    "/adapters/team/exported@v1",
    "/metrics/sentiment",
    "/lineage/polite@v1",
    "/fidelity/sentiment@v3",
    "/diff?a=sentiment%40v1&b=sentiment%40v3",
)


@pytest.mark.parametrize("path", PAGES)
def test_every_answer_is_guarded(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["img-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?! src=\"/static/)|<style|\son\w+=|\sstyle=|javascript:", answer.text)
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", ["/", "/adapters/sentiment@v3", "/api/adapters", "/nowhere", "/static/style.css"])
def test_nothing_but_reading(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path, content=b"x")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert "content-security-policy" in answer.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example:80", 400),
        ("", 400),
    ],
)
def test_other_hosts_are_refused(client: httpx.Client, host: str, status: int) -> None:
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == status
    assert ("Adapters" in answer.text) == (status == 200)


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/adapters/sentimen", 404, "sentiment"),
        ("/adapters/sentiment@v9", 404, "v3, v2, v1"),
        ("/adapters/sentiment:nothing", 404, "candidate"),
        ("/adapters/..%2F..%2Fetc%2Fpasswd", 404, "is not a reference"),
        ("/adapters/%00%ff%1b[31m", 404, "is not a reference"),
        ("/lineage/" + "x" * 5000, 404, "is not a reference"),
        ("/metrics/nothing", 404, "has no"),
        ("/pictures/metrics/sentiment?metric=nothing", 404, "no version has"),
        ("/pictures/fidelity/sentiment@v3?certificate=sha256:0&section=1", 404, "no picture"),
        ("/diff", 400, "a: "),
        ("/diff?a=/etc&b=/etc", 404, "is not a reference"),
        ("/?page=0", 400, "page: "),
        ("/?page=x", 400, "page: "),
        ("/?name=" + "x" * 501, 400, "name: "),
        ("/nowhere", 404, "Not Found"),
        ("/static/../web/guard.py", 404, "Not Found"),
        ("/static/..%2fguard.py", 404, "Not Found"),
    ],
)
def test_errors_are_pages(client: httpx.Client, path: str, status: int, told: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    assert told in html.unescape(answer.text)
    assert "Traceback" not in answer.text
    assert "<html" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_a_condition_that_is_none_is_told_beside_the_form(client: httpx.Client) -> None:
    answer = client.get("/", params={"metric": "accuracy>>1"})
    assert answer.status_code == 200
    assert "is no condition on a metric" in answer.text
    assert 'href="/adapters/sentiment"' in answer.text or "page 1 of" in answer.text
    assert client.get("/api/adapters", params={"metric": "accuracy>>1"}).status_code == 400


def test_errors_of_the_data_are_data(client: httpx.Client) -> None:
    missing = client.get("/api/adapters/sentiment@v9")
    assert missing.status_code == 404
    assert "v3, v2, v1" in missing.json()["error"]
    assert client.get("/api/diff?a=sentiment").status_code == 400


def test_search_and_pages(client: httpx.Client) -> None:
    def names(**query: object) -> list[str]:
        found = client.get("/api/adapters", params={key: str(value) for key, value in query.items()}).json()
        return [row["name"] for row in found["adapters"]]

    every = client.get("/api/adapters").json()
    assert (every["total"], every["pages"], len(every["adapters"])) == (MANY + 5, 2, 50)
    pages = [*names(), *names(page=2)]
    assert pages == sorted(pages)
    assert len(set(pages)) == MANY + 5
    assert names(page=99) == names(page=2)
    assert names(metric="accuracy>=0.9") == ["sentiment"]
    assert names(metric="accuracy>=0.82, loss<0.17") == ["sentiment"]
    assert names(metric="accuracy>=0.95") == []
    assert names(tag="production") == ["sentiment"]
    assert names(name="SENTI") == ["sentiment"]
    assert names(name="task-0", base="LLAMA") == [f"many/task-{number:02d}" for number in range(10)]
    assert names(base="nothing") == names(method="lora") == names(name="nothing") == []
    shown = client.get("/", params={"name": "many/", "page": 2}).text
    assert shown.count('<th scope="row" class="short">') == MANY - 50
    assert 'value="many/"' in shown
    assert "name=many" in re.findall(r'rel="prev">|href="(/\?[^"]*)" rel="prev"', shown)[0]


def test_the_data_are_those_of_the_store(client: httpx.Client, page_store: Store) -> None:
    shown = client.get("/api/adapters/sentiment:production").json()
    assert {**shown, "attachments": None} == {**page_store.show("sentiment@v3").to_dict(), "attachments": None}
    assert len(shown["attachments"]) == 2
    versions = client.get("/api/adapters/sentiment").json()
    assert [each["version"] for each in versions["versions"]] == [3, 2, 1]
    metrics = client.get("/api/metrics/sentiment").json()
    assert metrics["accuracy"] == {str(number): value for number, value in enumerate(ACCURACIES, 1)}
    events = client.get("/api/history/sentiment").json()["events"]
    assert [(each["tag"], each["version"]) for each in events if each["action"] == "tag"][:2] == [
        ("production", 3),
        ("production", 2),
    ]
    lineage = client.get("/api/lineage/polite@v1").json()
    assert {edge["relation"] for edge in lineage["edges"]} == {"composed", "converted"}
    difference = client.get("/api/diff", params={"a": "sentiment@v1", "b": "sentiment@v3"}).json()
    assert difference["distance"] > 0.5
    assert not difference["empty"]
    assert client.get("/api/diff", params={"a": "tone", "b": "tone@v1"}).json()["empty"]
    (certificate,) = client.get("/api/fidelity/sentiment").json()
    assert certificate["certificate"]["fidelity"]["top1_agreement"] == pytest.approx(1 - 0.0123)


def test_pages_say_what_matters(client: httpx.Client) -> None:
    def text(path: str) -> str:
        return html.unescape(re.sub(r"<[^>]+>", " ", client.get(path).text))

    version = text("/adapters/sentiment@v3")
    for word in ("block_output", "f2+l2", "0-1", "tiny-llama", "adapter.safetensors", "Signature", "production"):
        assert word in version, word
    assert "reft serve tiny-llama --adapter sentiment=sentiment@v3" in version
    assert "reft export ollama sentiment@v3 --base tiny-llama" in version
    assert re.search(r"production\s+moved to\s+v3", text("/adapters/sentiment"))
    fidelity = text("/fidelity/sentiment@v3")
    for word in ("98.77%", "q4_k_m", "positions were widened", "Error per layer"):
        assert word in fidelity, word
    assert "of another adapter" not in fidelity
    assert "of another adapter" in text("/fidelity/hostile")
    assert "not a certificate of schema" in text("/fidelity/hostile")
    assert "composed:  sentiment@v3" in text("/lineage/polite")
    assert "composed:  sentiment@v3" not in text("/lineage/tone")
    difference = text("/diff?a=sentiment@v1&b=sentiment@v3")
    assert "training.metrics.accuracy" in difference
    assert "They are the same adapter" not in difference
    assert "They are the same adapter" in text("/diff?a=sentiment@v1&b=sentiment@v1")


def test_pictures_show_what_they_are_of(client: httpx.Client) -> None:
    first, again, other = (
        client.get("/pictures/metrics/sentiment", params={"metric": name}) for name in ("accuracy", "accuracy", "loss")
    )
    assert first.headers["content-type"] == "image/svg+xml"
    assert first.content == again.content != other.content
    assert first.headers["content-security-policy"].startswith("default-src 'none'")
    assert "sandbox" in first.headers["content-security-policy"]
    sources = re.findall(r'<img src="(/pictures/fidelity[^"]*)"', client.get("/fidelity/sentiment@v3").text)
    drawn = [client.get(html.unescape(source)) for source in sources]
    assert [each.status_code for each in drawn] == [200, 200, 200]
    assert len({each.content for each in drawn}) == 3
    assert any("costs $5 or $6" in each.text for each in drawn)
    assert client.get("/pictures/metrics/hostile?metric=huge").status_code == 404


def test_hostile_texts_stay_texts(client: httpx.Client) -> None:
    paths = ("/", "/?name=hostile", "/adapters/hostile", "/adapters/hostile@v1", "/metrics/hostile")
    for path in (*paths, "/lineage/hostile", "/fidelity/hostile", "/diff?a=sentiment@v1&b=hostile@v1"):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert SCRIPT not in answer.text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", answer.text), path
        assert len(answer.content) < 150_000
    shown = html.unescape(client.get("/adapters/hostile@v1").text)
    assert SCRIPT in shown
    assert r"\x1b[31m\u202e" in shown
    assert "reft generate BASE --adapter" in shown
    assert client.get("/api/adapters/hostile@v1").json()["adapter"]["notes"]["long"] == "y" * 100_000


def test_every_link_leads_somewhere_and_nothing_changes(client: httpx.Client, page_store: Store) -> None:
    def state() -> dict[Path, str]:
        files = [page_store.root / "index.json", page_store.root / "history.jsonl", *page_store.root.glob("blobs/*/*")]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = state()
    waiting, seen = deque(["/"]), {"/"}
    while waiting:
        page = waiting.popleft()
        answer = client.get(page)
        assert answer.status_code == 200, page
        if not answer.headers["content-type"].startswith("text/html"):
            continue
        for link in re.findall(r'(?:href|src)="([^"#]+)"', answer.text):
            target = html.unescape(urljoin(page, link))
            assert not urlsplit(target).netloc, target
            if target not in seen and "many/task-" not in target:
                seen.add(target)
                waiting.append(target)
    assert len(seen) > 60
    assert state() == before
