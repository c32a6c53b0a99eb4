"""A stand-in of the Hugging Face Hub on loopback: as much of its HTTP interface as its own client uses for model
repositories with large files. Written from what `huggingface_hub` sends and demands: `_commit_api`, `lfs`,
`file_download` and `hf_api`. Content travels as git objects and LFS; there is no Xet storage behind it.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from hub_repositories import Entry, Refused, Repository

TOKEN = "hf_" + "t" * 34
Headers = dict[str, str]


@dataclass(frozen=True)
class Call:
    """One request that arrived: `path` is decoded."""

    method: str
    path: str
    headers: Headers
    body: bytes
    peer: str

    @property
    def writes(self) -> bool:
        """Whether it is to change something."""
        reading = ("/preupload/", "/paths-info/", "/objects/batch", "/validate-yaml", "/large-verification/")
        return self.method not in ("GET", "HEAD") and not any(each in self.path for each in reading)


@dataclass
class Hub:
    """The state of the stand-in, and what tests let happen to it.

    Attributes:
        calls: every request so far.
        intercept: called before a request is answered; may raise `Refused`, or answer it elsewhere first.
        lose: asked after a request was carried out; where it says so, the answer is lost.
        cut: bytes of every large download after which the connection breaks; None for never.
        private: repositories that answer as if they did not exist without the token.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    intercept: Callable[[Call], None] = lambda call: None
    lose: Callable[[Call], bool] = lambda call: False
    cut: int | None = None
    private: set[str] = field(default_factory=set)
    endpoint: str = ""

    def answer(self, call: Call, raw_parts: list[str]) -> Response:
        """What the Hub says."""
        self.calls.append(call)
        self.intercept(call)
        response = self._carry_out(call, raw_parts)
        if self.lose(call):
            raise Refused(507, None, "The answer got lost")
        return response

    def _carry_out(self, call: Call, raw_parts: list[str]) -> Response:
        match [unquote(part) for part in raw_parts]:
            case ["api", "repos", "create"]:
                return self._create(call)
            case ["api", "validate-yaml"]:
                return self._validate(json.loads(call.body)["content"])
            case ["api", "models", owner, name, *rest]:
                return self._api(call, self._repository(call, f"{owner}/{name}"), f"{owner}/{name}", rest)
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._authorised(call)
                self._repository(call, f"{owner}/{name.removesuffix('.git')}")
                return self._batch(json.loads(call.body))
            case ["large-storage", oid]:
                return self._large(call, oid)
            case ["large-verification", oid]:
                sound = len(self.large.get(oid, b"")) == json.loads(call.body)["size"]
                return JSONResponse({}, 200 if sound else 404)
            case [owner, name, "resolve", revision, *path]:
                return self._resolve(call, self._repository(call, f"{owner}/{name}"), revision, "/".join(path))
        raise Refused(404, None, f"the stand-in knows no {call.method} {call.path}")

    def _authorised(self, call: Call) -> None:
        if call.headers.get("authorization") != f"Bearer {TOKEN}":
            raise Refused(401, None, "Invalid username or password.")

    def _repository(self, call: Call, identity: str) -> Repository:
        authorised = call.headers.get("authorization") == f"Bearer {TOKEN}"
        if identity not in self.repositories or (identity in self.private and not authorised):
            raise Refused(404 if authorised else 401, "RepoNotFound", "Repository not found")
        return self.repositories[identity]

    def _create(self, call: Call) -> Response:
        self._authorised(call)
        wish = json.loads(call.body)
        identity = f"{wish['organization']}/{wish['name']}"
        url = {"url": f"{self.endpoint}/{identity}"}
        if identity in self.repositories:
            return JSONResponse({"error": "You already created this model repo", **url}, 409)
        self.repositories[identity] = Repository()
        if wish.get("visibility") == "private" or wish.get("private"):  # as newer and older clients say it
            self.private.add(identity)
        return JSONResponse(url)

    def _validate(self, content: str) -> Response:
        _, fence, rest = content.partition("---\n")
        facts, closing, _ = rest.partition("\n---\n")
        try:
            sound = bool(fence and closing) and isinstance(yaml.safe_load(facts), dict)
        except yaml.YAMLError:
            sound = False
        return JSONResponse({} if sound else {"errors": [{"message": "no metadata"}]}, 200 if sound else 400)

    def _api(self, call: Call, repository: Repository, identity: str, rest: list[str]) -> Response:
        match call.method, rest:
            case "GET", [] | ["revision", _]:
                oid = repository.resolve(rest[1] if rest else "main")
                siblings = [{"rfilename": path} for path in repository.commits[oid]]
                return JSONResponse({"_id": "0", "id": identity, "modelId": identity, "sha": oid, "siblings": siblings})
            case "GET", ["refs"]:
                return JSONResponse(
                    {
                        "tags": _refs("tags", repository.tags),
                        "branches": _refs("heads", repository.branches),
                        "converts": [],
                    }
                )
            case "GET", ["tree", revision, *path]:
                return self._tree(repository, revision, "/".join(path))
            case "POST", ["paths-info", revision]:
                files = repository.commits[repository.resolve(revision)]
                asked = parse_qs(call.body.decode())["paths"]
                return JSONResponse([files[path].info(path) for path in asked if path in files])
            case "POST", ["preupload", revision]:
                self._authorised(call)
                return self._preupload(repository, revision, json.loads(call.body)["files"])
            case "POST", ["commit", revision]:
                self._authorised(call)
                oid = repository.commit(revision, call.body.splitlines(), self.large)
                url = f"{self.endpoint}/{identity}/commit/{oid}"
                return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
            case "POST", ["tag", revision]:
                self._authorised(call)
                return _made(repository.tags, json.loads(call.body)["tag"], repository.resolve(revision))
            case "POST", ["branch", branch]:
                self._authorised(call)
                start = json.loads(call.body).get("startingPoint", "main")
                return _made(repository.branches, branch, repository.resolve(start))
            case "DELETE", [("tag" | "branch") as kind, name]:
                self._authorised(call)
                refs = repository.tags if kind == "tag" else repository.branches
                if refs.pop(name, None) is None:
                    raise Refused(404, "RevisionNotFound", f"{kind} {name} does not exist")
                return JSONResponse({})
        raise Refused(404, None, f"the stand-in knows no {call.method} {call.path}")

    def _tree(self, repository: Repository, revision: str, folder: str) -> Response:
        files = repository.commits[repository.resolve(revision)]
        prefix = f"{folder}/" if folder else ""
        found = [entry.info(path) for path, entry in sorted(files.items()) if path.startswith(prefix)]
        if not found:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return JSONResponse(found)

    def _preupload(self, repository: Repository, revision: str, files: list[dict[str, Any]]) -> Response:
        known = repository.commits[repository.resolve(revision)]
        return JSONResponse(
            {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": repository.upload_mode(each["path"], each["size"]),
                        "shouldIgnore": False,
                        "oid": known[each["path"]].etag if each["path"] in known else None,
                    }
                    for each in files
                ]
            }
        )

    def _batch(self, wish: dict[str, Any]) -> Response:
        assert (wish["operation"], wish["hash_algo"]) == ("upload", "sha256")
        objects = []
        for each in wish["objects"]:
            upload, verify = (f"{self.endpoint}/large-{what}/{each['oid']}" for what in ("storage", "verification"))
            actions = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append({**each, "actions": actions} if each["oid"] not in self.large else each)
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _large(self, call: Call, oid: str) -> Response:
        """The storage behind signed addresses, which refuses requests that carry a token of the Hub."""
        if "authorization" in call.headers:
            raise Refused(400, None, "Only one auth mechanism allowed")
        if call.method == "PUT":
            if hashlib.sha256(call.body).hexdigest() != oid:
                raise Refused(400, None, "The content does not match its checksum")
            self.large[oid] = call.body
            return Response()
        if oid not in self.large:
            raise Refused(403, None, "Access denied")
        return self._content(call, Entry(self.large[oid], lfs=True), {})

    def _resolve(self, call: Call, repository: Repository, revision: str, path: str) -> Response:
        oid = repository.resolve(revision)
        entry = repository.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid}
        if entry is None:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        if not entry.lfs:
            return self._content(call, entry, headers)
        linked = {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(len(entry.content))}
        location = {"Location": f"{self.endpoint.replace('127.0.0.1', 'localhost')}/large-storage/{entry.sha256}"}
        return Response(status_code=302, headers={**headers, **linked, **location})

    def _content(self, call: Call, entry: Entry, headers: Headers) -> Response:
        content, status = entry.content, 200
        headers = {**headers, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
        if wanted := call.headers.get("range"):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        headers["Content-Length"] = str(len(content))
        sent = content if self.cut is None or not entry.lfs else content[: self.cut]

        async def stream() -> AsyncIterator[bytes]:
            if call.method != "HEAD":
                yield sent

        return StreamingResponse(stream(), status, headers)


def _refs(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]


def _made(refs: dict[str, str], name: str, oid: str) -> Response:
    if name in refs:
        raise Refused(409, None, f"reference {name} already exists")
    refs[name] = oid
    return JSONResponse({})


class Server:
    """Serves a hub on a free port of loopback while it is entered."""

    def __init__(self) -> None:
        self.hub = Hub()
        app = FastAPI()

        @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"])
        async def every(request: Request) -> Response:
            raw = request.scope["raw_path"].decode()
            peer = request.client.host if request.client else ""
            call = Call(request.method, unquote(raw), dict(request.headers), await request.body(), peer)
            try:
                return await run_in_threadpool(self.hub.answer, call, raw.strip("/").split("/"))
            except Refused as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code is not None:
                    headers["X-Error-Code"] = refusal.code
                return JSONResponse({"error": refusal.message}, refusal.status, headers)

        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.hub.endpoint = f"http://127.0.0.1:{port}"
        return self.hub

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
