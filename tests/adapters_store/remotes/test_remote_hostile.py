"""Registries that lie, stall, or flood: errors that are meant, in bounded time and space, and nothing is written."""

from __future__ import annotations

import base64
import gzip
import json
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from stand_in import INDEX_TYPE, Handler, StandIn, digest_of

from adapters_store import Store
from adapters_store.layout.oci import MAX_MANIFEST_BYTES, SIGNATURE_TYPE
from adapters_store.remotes.address import Address
from adapters_store.remotes.registry import Registry
from adapters_store.remotes.remote import UnreachableError
from adapters_store.remotes.session import Patience
from adapters_store.remotes.transfer import IncompleteTransferError, pull, push
from reft_plugins.errors import ReftError, StoreError

CALM = Patience(connect=10, silence=30, answer=60, retry_delay=0.01)
HASTE = Patience(connect=2, silence=0.3, answer=0.5, bytes_per_second=1e8, retry_delay=0.01)
SECONDS = 10.0
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def stand_in(store: Store, adapters: list[Path]) -> Iterator[StandIn]:
    """A sound registry with `sentiment` v1 and v2, of which `latest` is the second."""
    store.add(adapters[0], "sentiment:old")
    store.add(adapters[1], "sentiment:latest")
    server = StandIn()
    server.fill(store, "sentiment")
    yield server
    server.shutdown()
    server.server_close()


def registry(server: StandIn, patience: Patience = CALM, chunk: int = 1 << 24) -> Registry:
    return Registry(Address("oci", "", server.host), patience=patience, chunk=chunk)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(stand_in: StandIn, other_store: Store, tmp_path: Path) -> Callable[..., ReftError]:
    """Pulls, and expects an error of ours in time, an empty and sound store, and no file anywhere else."""

    def attempt(reference: str = "sentiment:latest", patience: Patience = CALM) -> ReftError:
        before = files_below(tmp_path)
        begin = time.monotonic()
        with pytest.raises(ReftError) as raised:
            pull(registry(stand_in, patience), reference, other_store)
        assert time.monotonic() - begin < SECONDS
        assert other_store.list() == ()
        assert other_store.verify().ok
        strays = {path for path in files_below(tmp_path) - before if not path.is_relative_to(other_store.root)}
        assert strays == set()
        assert str(raised.value).isprintable()
        return raised.value

    return attempt


def test_the_stand_in_is_a_registry(stand_in: StandIn, other_store: Store, store: Store) -> None:
    """Without this, everything below could be refused for another reason."""
    pull(registry(stand_in), "sentiment", other_store)
    assert [(each.digest, each.tags) for each in other_store.list()] == [
        (each.digest, each.tags) for each in store.list()
    ]
    assert registry(stand_in).names() == ["sentiment"]
    empty = StandIn()
    push(store, "sentiment", registry(empty))
    assert empty.blobs == stand_in.blobs
    assert empty.manifests == stand_in.manifests
    empty.shutdown()


def _page(handler: Handler) -> None:
    handler.answer(200, b"<html>Please log in to the hotel's network</html>", "text/html")


def _json(text: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(200, text.encode(), MANIFEST_TYPE)


def _zeros(headers: dict[str, str]) -> Callable[[Handler], None]:
    return lambda handler: handler.endless(bytes(1 << 16), headers)


def _altered(handler: Handler) -> None:
    data = bytearray(handler.server.blobs[handler.what])
    data[-1] ^= 1
    handler.answer(200, bytes(data), "x/y")


def _shorter(handler: Handler) -> None:
    handler.answer(200, handler.server.blobs[handler.what][:-1], "x/y")


def _breaks_off(handler: Handler) -> None:
    data = handler.server.blobs[handler.what]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[:100])
    handler.close_connection = True


def _silent(handler: Handler) -> None:
    time.sleep(2)
    handler.close_connection = True


def _raw(*pieces: bytes, pause: float = 0.0) -> Callable[[Handler], None]:
    """Writes the first piece once, then the second until the client hangs up."""

    def answer(handler: Handler) -> None:
        try:
            handler.wfile.write(pieces[0])
            end = time.monotonic() + 3 * SECONDS
            while time.monotonic() < end:
                handler.wfile.write(pieces[1])
                handler.wfile.flush()
                time.sleep(pause)
        except OSError:
            pass
        handler.close_connection = True

    return answer


def _compressed(handler: Handler) -> None:
    handler.answer(200, gzip.compress(bytes(1 << 26)), MANIFEST_TYPE, Content_Encoding="gzip")


STALLING = {
    "never answers": _silent,
    "drips its status": _raw(b"HTTP/1.1 200 ", b"O", pause=0.2),
    "drips a header": _raw(b"HTTP/1.1 200 OK\r\nX-Header: ", b"x", pause=0.2),
    "headers without end": _raw(b"HTTP/1.1 200 OK\r\n", b"X-Header: x\r\n", pause=0.001),
    "one header without end": _raw(b"HTTP/1.1 200 OK\r\nX-Header: ", b"x" * 4096),
    "continues without end": _raw(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.01),
    "drips its body": lambda handler: handler.endless(b" ", {"Content-Type": MANIFEST_TYPE}, pause=0.2),
    "drips chunks": _raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\n \r\n",
        pause=0.2,
    ),
    "one length without end": _raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 4096),
    "trailers without end": _raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n0\r\n", b"X: y\r\n", pause=0.01
    ),
    "hangs up": lambda handler: setattr(handler, "close_connection", True),
    "speaks something else": _raw(b"SSH-2.0-OpenSSH_9.9\r\n", b"\0" * 64, pause=0.05),
}


HEADS = ("never answers", "drips its status", "drips a header", "headers without end", "hangs up")
"""Those that matter before there is a body."""


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("HEAD manifests", how) for how in HEADS),
        *((kind, how) for kind in ("GET manifests", "GET blobs") for how in STALLING),
    ],
)
def test_stalling(refused: Callable[..., ReftError], stand_in: StandIn, kind: str, how: str) -> None:
    stand_in.worse[kind] = STALLING[how]
    assert isinstance(refused("sentiment", HASTE), UnreachableError)


WORSE = {
    "a page for everything": ("* manifests", _page),
    "a page for blobs": ("GET blobs", _page),
    "a page for tags": ("GET tags", _page),
    "garbage": ("GET manifests", _json("{")),
    "deep": ("GET manifests", _json("[" * 100_000)),
    "deep tags": ("GET tags", _json('{"tags":' + "[" * 100_000)),
    "numbers for tags": ("GET tags", _json('{"tags": [1, 2]}')),
    "a list for an object": ("GET tags", _json("[]")),
    "duplicate keys": ("GET tags", _json('{"tags": ["v1"], "tags": []}')),
    "not text": ("GET tags", lambda handler: handler.answer(200, b"\xff\xfe\x00{")),
    "a manifest without end": ("GET manifests", _zeros({"Content-Type": MANIFEST_TYPE, "Content-Length": "9" * 15})),
    "tags without end": ("GET tags", _zeros({"Content-Type": "application/json"})),
    "a compressed flood": ("GET manifests", _compressed),
    "an altered blob": ("GET blobs", _altered),
    "a shorter blob": ("GET blobs", _shorter),
    "a blob that breaks off": ("GET blobs", _breaks_off),
    "a blob without end": ("GET blobs", _zeros({"Content-Type": "x/y"})),
    "a blob announced too long": ("GET blobs", _zeros({"Content-Length": "9" * 18})),
    "a compressed blob": ("GET blobs", lambda handler: handler.answer(200, b"x", Content_Encoding="gzip")),
    "a blob of elsewhere": (
        "GET blobs",
        lambda handler: handler.answer(206, b"x", Content_Range="bytes 7-7/8"),
    ),
    "unsatisfiable": ("GET blobs", lambda handler: handler.answer(416)),
    "no content": ("GET blobs", lambda handler: handler.answer(204)),
    "a strange status": ("GET manifests", lambda handler: handler.answer(299, b"{}")),
    "a teapot": ("HEAD manifests", lambda handler: handler.answer(418)),
    "round and round": ("* manifests", lambda handler: handler.redirect(handler.path)),
    "to a file": ("GET blobs", lambda handler: handler.redirect("file:///etc/passwd")),
    "to a strange place": ("GET blobs", lambda handler: handler.redirect("gopher://127.0.0.1/")),
    "to no port": ("GET blobs", lambda handler: handler.redirect("http://127.0.0.1:99999999/")),
    "to no host": ("GET blobs", lambda handler: handler.redirect("http://[::1")),
    "out of encryption": ("GET blobs", lambda handler: handler.redirect("http://192.0.2.1/blob")),
    "busy for ever": ("* manifests", lambda handler: handler.answer(503, Retry_After="0")),
}


@pytest.mark.parametrize("how", WORSE)
def test_worse_answers(refused: Callable[..., ReftError], stand_in: StandIn, how: str) -> None:
    kind, answer = WORSE[how]
    stand_in.worse[kind] = answer
    refused("sentiment")
    assert stand_in.served < 40 * MAX_MANIFEST_BYTES


def test_what_is_read_of_an_endless_answer_is_bounded(refused: Callable[..., ReftError], stand_in: StandIn) -> None:
    stand_in.worse["GET manifests"] = _zeros({"Content-Type": MANIFEST_TYPE})
    assert "exceeds the limit of 4194304" in str(refused())
    assert stand_in.served < 4 * MAX_MANIFEST_BYTES


@pytest.mark.parametrize("reference", ["sentiment:latest", "sentiment@v2"])
def test_a_manifest_that_is_not_the_one_promised(
    refused: Callable[..., ReftError], stand_in: StandIn, reference: str
) -> None:
    digest = stand_in.server_digest = digest_of(stand_in.manifests["latest"][1])
    stand_in.manifests[digest] = stand_in.manifests["old"]
    assert "another digest" in str(refused(reference))


def _lies(**headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        media_type, data = handler.server.manifests[handler.what]
        handler.answer(200, data, media_type, **{"Docker_Content_Digest": digest_of(data), **headers})

    return answer


@pytest.mark.parametrize(
    "headers",
    [
        {"Docker_Content_Digest": "sha256:" + "0" * 64},
        {"Docker_Content_Digest": "sha256:../../../../etc/passwd"},
        {"Content_Length": "99999999999999999999999"},
        {"Content_Type": "x" * 5000},
    ],
)
def test_a_head_that_lies(stand_in: StandIn, other_store: Store, headers: dict[str, str]) -> None:
    """Either it does not matter, or it is refused; what arrives is always what was named."""
    stand_in.worse["HEAD manifests"] = _lies(**headers)
    try:
        pull(registry(stand_in), "sentiment:latest", other_store)
    except ReftError:
        assert other_store.list() == ()
    else:
        assert other_store.find("sentiment:latest").digest == digest_of(stand_in.manifests["latest"][1])
    assert other_store.verify().ok


def _edit(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for each in parents:
        document = document[int(each)] if each.isdigit() else document[each]  # type: ignore[index]
    if value is None:
        del document[last]
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("artifactType", None),
        ("artifactType", "application/vnd.example.helm"),
        ("mediaType", "application/vnd.docker.distribution.manifest.v2+json"),
        ("schemaVersion", 1),
        ("config", None),
        ("config.digest", "sha256:../../../../etc/passwd"),
        ("config.digest", "sha512:" + "0" * 128),
        ("config.digest", "sha256:" + "0" * 64),
        ("config.size", -1),
        ("config.size", 2**62),
        ("config.size", 1),
        ("config.mediaType", "application/json"),
        ("layers", []),
        ("layers.0.digest", "sha256:" + "f" * 64),
        ("layers.0.digest", "../../evil"),
        ("layers.0.size", 2**62),
        ("layers.0.size", 10),
        ("layers.0.size", "10"),
        ("annotations", {"vnd.reft.method": "lora"}),
        ("annotations", {"a": {"b": "c"}}),
    ],
)
def test_manifests_that_do_not_describe_an_adapter(
    refused: Callable[..., ReftError], stand_in: StandIn, path: str, value: Any
) -> None:
    document = json.loads(stand_in.manifests["latest"][1])
    _edit(document, path, value)
    stand_in.put_manifest(document, "worse")
    refused("sentiment:worse")


def test_names_of_files_are_never_taken_from_a_registry(stand_in: StandIn, other_store: Store, tmp_path: Path) -> None:
    document = json.loads(stand_in.manifests["latest"][1])
    for each in (document["config"], document["layers"][0]):
        each["annotations"] = {"org.opencontainers.image.title": "../../evil"}
    stand_in.put_manifest(document, "evil")
    pull(registry(stand_in), "sentiment:evil", other_store)
    folder = other_store.checkout("sentiment:evil")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert not [path for path in files_below(tmp_path) if "evil" in path.name]


def test_names_and_tags_that_no_store_can_have_are_left_out(stand_in: StandIn, other_store: Store) -> None:
    stand_in.repositories = [
        "sentiment",
        "../../etc",
        "/etc",
        "A",
        "a//b",
        "a:b",
        "a@v1",
        "",
        "x" * 300,
        "a b",
        "\x1b[1m",
    ]
    assert registry(stand_in).names() == ["sentiment"]
    for tag in ("../../evil", "_hidden", "v0", "v99999999999", "a" * 200, "\x1b[1m", ""):
        stand_in.manifests[tag] = stand_in.manifests["latest"]
    done = pull(registry(stand_in), "sentiment", other_store)
    assert {tag for record in other_store.list() for tag in record.tags} <= {"old", "latest", "v0", "v99999999999"}
    assert len(done.skipped) >= 4


def test_listings_without_end(stand_in: StandIn) -> None:
    pages = 0

    def tags(handler: Handler) -> None:
        nonlocal pages
        pages += 1
        link = f'</v2/sentiment/tags/list?n=1000&last={pages}>; rel="next"'
        handler.answer(200, b'{"tags": ["a", "b"]}', Link=link)

    stand_in.worse["GET tags"] = tags
    with pytest.raises(StoreError, match="no end after 1000 pages"):
        registry(stand_in).tags("sentiment")
    assert pages == 1000
    stand_in.worse["GET tags"] = lambda handler: handler.answer(
        200, b'{"tags": ["a"]}', Link='<http://127.0.0.1:1/v2/x/tags/list>; rel="next"'
    )
    with pytest.raises(StoreError, match="goes on at another host"):
        registry(stand_in).tags("sentiment")
    many = json.dumps({"tags": [f"t{number}" for number in range(100_001)]}).encode()
    stand_in.worse["GET tags"] = lambda handler: handler.answer(200, many)
    with pytest.raises(StoreError, match="more than 100000 entries"):
        registry(stand_in).tags("sentiment")


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_registries_that_do_not_list_their_repositories(stand_in: StandIn, status: int) -> None:
    """An empty list would look as if there were nothing."""
    stand_in.worse["GET catalog"] = lambda handler: handler.answer(status)
    with pytest.raises(StoreError, match="does not list its repositories to you"):
        registry(stand_in).names()


def test_attachments_that_are_not_what_they_should_be_do_not_spoil_the_version(
    stand_in: StandIn, other_store: Store
) -> None:
    subject = digest_of(stand_in.manifests["latest"][1])
    good = _attachment(stand_in, subject, "signature.json", b"good")
    worse = [
        _attachment(stand_in, "sha256:" + "1" * 64, "signature.json", b"of another version"),
        _attachment(stand_in, subject, "../../evil", b"evil"),
        _attachment(stand_in, subject, "signature.json", b"missing", there=False),
        _attachment(stand_in, subject, "signature.json", b"", size=2**40),
        {**good, "digest": "sha256:" + "2" * 64},
    ]
    foreign = {**good, "artifactType": "application/vnd.example.sbom"}
    stand_in.referrers[subject] = [*worse, foreign, good]
    done = pull(registry(stand_in), "sentiment:latest", other_store)
    assert done.versions[0].attachments == (good["digest"],)
    assert len(done.skipped) == len(worse)
    assert [each.descriptor.digest for each in other_store.attachments("sentiment:latest")] == [good["digest"]]
    assert other_store.verify().ok
    stand_in.referrers[subject] = [good] * 1001
    with pytest.raises(StoreError, match="more than 1000"):
        pull(registry(stand_in), "sentiment:latest", other_store)


def test_registries_that_know_referrers_get_no_tags_for_them(
    stand_in: StandIn, store: Store, other_store: Store
) -> None:
    """The other half of what the real registry of the tests does not have."""
    store.attach("sentiment@v2", SIGNATURE_TYPE, {"signature.json": ("application/json", b"{}")})
    modern = StandIn()

    def put(handler: Handler) -> None:
        data = handler.body()
        document = json.loads(data)
        modern.put_manifest(data, handler.what)
        if "subject" not in document:
            handler.answer(201, Docker_Content_Digest=digest_of(data))
            return
        subject = document["subject"]["digest"]
        found = {"mediaType": MANIFEST_TYPE, "artifactType": document["artifactType"]}
        modern.referrers[subject] = [{**found, "digest": digest_of(data), "size": len(data)}]
        handler.answer(201, OCI_Subject=subject)

    modern.worse["PUT manifests"] = put
    sent = push(store, "sentiment", registry(modern))
    assert [len(each.attachments) for each in sent.versions] == [0, 1]
    assert not [reference for reference in modern.manifests if reference.startswith("sha256-")]
    assert [each.attachments for each in push(store, "sentiment", registry(modern)).versions] == [(), ()]
    pull(registry(modern), "sentiment", other_store)
    assert len(other_store.attachments("sentiment@v2")) == 1
    modern.shutdown()


def _attachment(
    server: StandIn, subject: str, name: str, content: bytes, there: bool = True, size: int | None = None
) -> dict[str, Any]:
    if there:
        server.blobs[digest_of(content)] = content
    server.blobs[digest_of(b"{}")] = b"{}"
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": SIGNATURE_TYPE,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2},
        "layers": [
            {
                "mediaType": "application/json",
                "digest": digest_of(content),
                "size": len(content) if size is None else size,
                "annotations": {"org.opencontainers.image.title": name},
            }
        ],
        "subject": {"mediaType": MANIFEST_TYPE, "digest": subject, "size": 400},
    }
    digest = server.put_manifest(document)
    size_of = len(server.manifests[digest][1])
    return {"mediaType": MANIFEST_TYPE, "artifactType": SIGNATURE_TYPE, "digest": digest, "size": size_of}


@pytest.fixture
def logged_in(stand_in: StandIn, no_login: Path) -> str:
    """A password for the stand-in, as it appears in headers."""
    secret = base64.b64encode(b"user:secret").decode()
    (no_login / "config.json").write_text(json.dumps({"auths": {stand_in.host: {"auth": secret}}}))
    return secret


def _challenge(text: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(401, Www_Authenticate=text)


HERE = 'Bearer realm="HERE/token"'


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ('Basic realm="x"', ""),
        ("Basic", ""),
        ("", ""),
        ("Bearer", ""),
        ('Bearer realm=""', ""),
        ('Bearer realm="file:///etc/passwd"', ""),
        ('Bearer realm="http://192.0.2.1/token"', ""),
        ('Bearer realm="http://[::1/token"', ""),
        ('Bearer realm="nonsense"', ""),
        ("Negotiate", ""),
        ("\x1b[1m" * 100, ""),
        (HERE, '{"token": ["a"]}'),
        (HERE, '{"token": "a\\r\\nX-Evil: 1"}'),
        (HERE, "[]"),
        (HERE, "{"),
        (HERE, "[" * 100_000),
        (HERE, json.dumps({"token": "x" * 100_000})),
        (HERE, '{"token": "useless"}'),
    ],
)
def test_logins_that_lead_nowhere(
    refused: Callable[..., ReftError], stand_in: StandIn, logged_in: str, text: str, token: str
) -> None:
    stand_in.worse["* manifests"] = _challenge(text.replace("HERE", f"http://{stand_in.host}"))
    stand_in.worse["GET other"] = lambda handler: handler.answer(200, token.encode())
    error = refused()
    assert "secret" not in str(error)
    assert logged_in not in str(error)
    assert not [headers for _, _, headers in stand_in.seen if "X-Evil" in headers]


def test_a_bearer_token_is_fetched_with_the_password_and_used(
    stand_in: StandIn, logged_in: str, other_store: Store
) -> None:
    def manifests(handler: Handler) -> None:
        if handler.headers.get("Authorization") == "Bearer good":
            Handler._manifests(handler)
        else:
            realm = f"http://{stand_in.host}/token"
            handler.answer(
                401, Www_Authenticate=f'Bearer realm="{realm}",service="s",scope="repository:sentiment:pull"'
            )

    stand_in.worse["* manifests"] = manifests
    stand_in.worse["GET other"] = lambda handler: handler.answer(200, b'{"token": "good"}')
    pull(registry(stand_in), "sentiment:latest", other_store)
    asked = [(path, headers) for _, path, headers in stand_in.seen if path.startswith("/token")]
    assert len(asked) == 1
    assert asked[0][1]["Authorization"] == f"Basic {logged_in}"
    assert "scope=repository%3Asentiment%3Apull" in asked[0][0]
    assert len(other_store.list()) == 1


def test_passwords_stay_with_the_registry(
    stand_in: StandIn, logged_in: str, other_store: Store, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither a redirect nor an upload's address takes them elsewhere, and `.netrc` has no say."""
    elsewhere = StandIn()
    elsewhere.blobs = stand_in.blobs

    def guarded(answer: Callable[[Handler], None]) -> Callable[[Handler], None]:
        def check(handler: Handler) -> None:
            authorized = handler.headers.get("Authorization") == f"Basic {logged_in}"
            answer(handler) if authorized else handler.answer(401, Www_Authenticate='Basic realm="x"')

        return check

    def send_uploads_elsewhere(handler: Handler) -> None:
        name = f"u{len(elsewhere.uploads)}"
        elsewhere.uploads[name] = bytearray()
        handler.answer(202, Location=f"http://{elsewhere.host}/v2/x/blobs/uploads/{name}")

    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    stand_in.worse["* manifests"] = guarded(Handler._manifests)
    stand_in.worse["GET blobs"] = guarded(lambda handler: handler.redirect(f"http://{elsewhere.host}{handler.path}"))
    pull(registry(stand_in), "sentiment:latest", other_store)
    other_store.add(store.checkout("sentiment@v1"), "new")
    stand_in.manifests.clear()
    stand_in.worse["HEAD blobs"] = lambda handler: handler.answer(404)
    stand_in.worse["POST uploads"] = guarded(send_uploads_elsewhere)
    push(other_store, "new", registry(stand_in))
    assert {method for method, _, _ in elsewhere.seen} == {"GET", "PUT"}
    assert not [headers for _, _, headers in elsewhere.seen if "Authorization" in headers]
    elsewhere.shutdown()


def test_an_upload_goes_on_behind_what_arrived(store: Store, large_adapter: Path) -> None:
    """As the specification has it; the registry that the other tests use cannot do it."""
    store.add(large_adapter, "large:prod")
    size = (large_adapter / "adapter.safetensors").stat().st_size
    received = 0
    broken = 0

    def patch(handler: Handler) -> None:
        nonlocal received, broken
        upload = handler.server.uploads[handler.what]
        if broken < 3:
            part = handler.rfile.read(300_000)
            upload += part
            received += len(part)
            broken += 1
            handler.close_connection = True
            return
        received += int(handler.headers["Content-Length"])
        assert handler.headers["Content-Range"].startswith(f"{len(upload)}-")
        Handler._uploads(handler)

    empty = StandIn()
    empty.worse["PATCH uploads"] = patch
    push(store, "large", registry(empty, chunk=1 << 20))
    assert broken == 3
    assert received == size
    assert store.show("large:prod").image_manifest["layers"][0]["digest"] in empty.blobs
    empty.shutdown()


def test_an_upload_that_cannot_go_on_begins_again(store: Store, large_adapter: Path) -> None:
    """The registry says where to go on, and then will not have it."""
    store.add(large_adapter, "large:prod")
    empty = StandIn()
    steps: list[str] = []

    def patch(handler: Handler) -> None:
        steps.append(handler.what)
        if len(steps) == 2:
            handler.rfile.read(1000)
            handler.close_connection = True
        elif len(steps) == 3:
            handler.answer(404)
            handler.close_connection = True
        else:
            Handler._uploads(handler)

    empty.worse["PATCH uploads"] = patch
    push(store, "large", registry(empty, chunk=1 << 20))
    first, *_ = steps
    assert steps[:3] == [first] * 3
    assert first not in steps[3:]
    assert store.show("large:prod").image_manifest["layers"][0]["digest"] in empty.blobs
    empty.shutdown()


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("POST uploads", lambda handler: handler.answer(202, Location="file:///etc/passwd")),
        ("POST uploads", lambda handler: handler.answer(202, Location="http://[::1")),
        ("POST uploads", lambda handler: handler.answer(202, Location="http://192.0.2.1/upload")),
        ("POST uploads", lambda handler: handler.answer(500, b"<html>")),
        ("POST uploads", _silent),
        ("PUT uploads", lambda handler: handler.answer(200)),
        ("PUT uploads", lambda handler: handler.redirect("http://127.0.0.1:1/")),
        ("PUT uploads", lambda handler: handler.answer(413)),
        ("PUT uploads", _silent),
        ("PUT manifests", lambda handler: handler.answer(201, Docker_Content_Digest="sha256:" + "0" * 64)),
        ("PUT manifests", lambda handler: handler.answer(429, Retry_After="0")),
    ],
)
def test_pushing_to_what_does_not_behave(
    stand_in: StandIn, store: Store, kind: str, answer: Callable[[Handler], None]
) -> None:
    empty = StandIn()
    empty.worse[kind] = answer
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"oci://127\.0\.0\.1:\d+/sentiment|no web address|without encryption|place"):
        push(store, "sentiment:latest", registry(empty, HASTE))
    assert time.monotonic() - begin < SECONDS
    assert store.verify().ok
    empty.shutdown()


def test_a_registry_that_fails_now_and_then(stand_in: StandIn, other_store: Store) -> None:
    """Some answer with 500 while others push the same; what only asks is asked again."""
    failures = {"GET manifests": 2, "GET blobs": 1}

    def now_and_then(kind: str, right: Callable[[Handler], None]) -> Callable[[Handler], None]:
        def answer(handler: Handler) -> None:
            failures[kind] -= 1
            handler.answer(500) if failures[kind] >= 0 else right(handler)

        return answer

    stand_in.worse["GET manifests"] = now_and_then("GET manifests", Handler._manifests)
    stand_in.worse["GET blobs"] = now_and_then("GET blobs", Handler._blobs)
    pull(registry(stand_in, HASTE), "sentiment:latest", other_store)
    assert other_store.verify().ok
    assert all(count < 0 for count in failures.values())
    stand_in.worse = {"* manifests": lambda handler: handler.answer(500)}
    with pytest.raises(StoreError, match=r"the registry could not .*: 500 Internal Server Error.* Try again later"):
        pull(registry(stand_in, HASTE), "sentiment:latest", other_store, name="other")


def test_a_version_that_is_overwritten_meanwhile_is_told(stand_in: StandIn, store: Store) -> None:
    """Two push the same new version at once; the one that lost hears of it."""
    empty = StandIn()

    def put(handler: Handler) -> None:
        Handler._manifests(handler)
        handler.server.manifests["v2"] = stand_in.manifests["old"]

    empty.worse["PUT manifests"] = put
    with pytest.raises(StoreError, match="v2 is other content"):
        push(store, "sentiment:latest", registry(empty))
    empty.shutdown()


@pytest.fixture
def encrypted(stand_in: StandIn, tmp_path: Path) -> Path:
    """Lets the stand-in speak TLS; returns the certificate that it signed itself."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stand-in")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder(name, name, secret.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(secret, hashes.SHA256())
    )
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    stand_in.socket = context.wrap_socket(stand_in.socket, server_side=True)
    return certificate


def test_certificates_are_always_verified(
    stand_in: StandIn, encrypted: Path, other_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Address, "loopback", False)  # or it would not be encrypted
    with pytest.raises(UnreachableError, match=r"certificate is not trusted here.*REQUESTS_CA_BUNDLE"):
        pull(registry(stand_in), "sentiment", other_store)
    assert stand_in.seen == []
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(encrypted))
    pull(registry(stand_in), "sentiment", other_store)
    assert len(other_store.list()) == 2
    stand_in.worse["GET blobs"] = lambda handler: handler.redirect(f"http://192.0.2.1{handler.path}")
    with pytest.raises(StoreError, match="without encryption"):
        pull(registry(stand_in), "sentiment", Store.init(other_store.root.parent / "third"))


def test_unencrypted_http_is_only_for_this_machine() -> None:
    with pytest.raises(StoreError, match="could not"):
        Registry(Address("oci", "", "192.0.2.1:1"), patience=HASTE).names()
    remote = Registry(Address("oci", "", "192.0.2.1:1"), plain_http=False, patience=HASTE)
    assert remote._client.prefix == "https"
    with pytest.raises(StoreError, match=r"192\.0\.2\.1: would be asked without encryption.*--plain-http"):
        remote._client.session.get("http://192.0.2.1:1/v2/")
    assert Registry(Address("oci", "", "192.0.2.1:1"), plain_http=True, patience=HASTE)._client.prefix == "http"


def test_unreachable_is_told_apart_from_refused(stand_in: StandIn, other_store: Store) -> None:
    stand_in.worse["GET blobs"] = lambda handler: handler.answer(500)
    with pytest.raises(UnreachableError):
        pull(registry(stand_in), "sentiment", other_store)
    stand_in.worse["GET blobs"] = _altered
    with pytest.raises(IncompleteTransferError) as raised:
        pull(registry(stand_in), "sentiment", other_store)
    assert len(raised.value.errors) == 2
    assert not any(isinstance(error, UnreachableError) for error in raised.value.errors)
    assert INDEX_TYPE not in str(raised.value)
