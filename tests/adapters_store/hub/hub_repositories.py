"""Repositories of the Hub's stand-in: commits are trees of files, tags and branches point to them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

INITIAL = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


class Refused(Exception):
    """An answer other than success: HTTP status, the Hub's error code if it has one, and its message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `lfs` files live in the large file storage under their SHA-256."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        content = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def info(self, path: str) -> dict[str, object]:
        """As the Hub describes it in listings."""
        facts: dict[str, object] = {
            "type": "file",
            "path": path,
            "size": len(self.content),
            "oid": self.git_oid,
        }
        if self.lfs:
            facts["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return facts


@dataclass
class Repository:
    """One repository: commits by id, in the order they were made, and the refs that point to them."""

    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files = {path: Entry(content, lfs=False) for path, content in INITIAL.items()}
        self.branches["main"] = self.record(files, "initial commit", parent="")

    def record(self, files: dict[str, Entry], title: str, parent: str) -> str:
        """A new commit's id."""
        described = json.dumps(
            [parent, title, len(self.commits), {path: files[path].git_oid for path in sorted(files)}]
        )
        oid = hashlib.sha1(described.encode()).hexdigest()
        self.commits[oid] = files
        self.titles[oid] = title
        return oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or an id means."""
        for known in (self.branches, self.tags):
            if revision in known:
                return known[revision]
        if revision in self.commits:
            return revision
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def upload_mode(self, path: str, size: int) -> str:
        """Whether git or the large file storage keeps a file."""
        return "lfs" if path.endswith(".safetensors") or size > 10 * 1024 * 1024 else "regular"

    def commit(self, branch: str, lines: Iterable[bytes], large: dict[str, bytes]) -> str:
        """Apply the lines of a commit request to a branch."""
        if branch not in self.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        parent = self.branches[branch]
        files = dict(self.commits[parent])
        title = ""
        for line in lines:
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                if self.upload_mode(value["path"], 0) == "lfs":
                    raise Refused(400, None, f"{value['path']} has to be in the large file storage")
                files[value["path"]] = Entry(base64.b64decode(value["content"], validate=True), lfs=False)
            elif key == "lfsFile":
                content = large.get(value["oid"])
                if value["algo"] != "sha256" or content is None or len(content) != value["size"]:
                    raise Refused(400, None, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = Entry(content, lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise Refused(400, None, f"unknown operation {key}")
        self.branches[branch] = self.record(files, title, parent)
        return self.branches[branch]
