"""What `huggingface_hub` does for one model repository: with bounds, and with errors that say what to do.

Token, endpoint and proxies are found as that library finds them (`HF_TOKEN` or its login, `HF_ENDPOINT`, …).
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from adapters_store import limits
from adapters_store.remotes.remote import Progress, UnreachableError
from reft_plugins.errors import ReftError, StoreError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, RepoFile
    from huggingface_hub.errors import HfHubHTTPError

MAX_LISTED_FILES = limits.MAX_LISTED_FILES
TIMEOUT_SECONDS = 60.0
"""Without an answer, or a further piece of one, where the library itself would wait without end."""
MAIN = "main"
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
"""What the library raises on an answer that it does not understand."""
_LOGIN = "Log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Refs:
    """The commits that branches and tags of a repository point to."""

    branches: dict[str, str]
    tags: dict[str, str]


class HubClient:
    """One model repository. Every method raises `StoreError`, naming it, when the Hub does not do what it should."""

    def __init__(self, repository: str, endpoint: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.repository = repository
        self.api = HfApi(endpoint=endpoint, library_name="reft-plugins")

    @property
    def address(self) -> str:
        """`hf://org/repo`."""
        return f"hf://{self.repository}"

    def create(self, private: bool) -> None:
        """Make the repository unless it is there, which then stays as public as it is."""
        with self._calling("make the repository"):
            self.api.create_repo(self.repository, private=private, exist_ok=True)

    def refs(self) -> Refs | None:
        """Branches and tags; None where there is no repository, as far as a login can tell.

        Raises:
            StoreError: also without a login, because the repository may be there for others.
        """
        from huggingface_hub import get_token
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with self._calling("list its versions"):
            try:
                found = self.api.list_repo_refs(self.repository)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                if get_token() is None:
                    raise
                return None
            return Refs(
                {each.name: each.target_commit for each in found.branches},
                {each.name: each.target_commit for each in found.tags},
            )

    def file(self, commit: str, path: str) -> RepoFile | None:
        """What the Hub says about a file, None where there is no such file."""
        from huggingface_hub.hf_api import RepoFile

        with self._calling(f"look up {path}"):
            found = self.api.get_paths_info(self.repository, [path], revision=commit)
            return next((each for each in found if isinstance(each, RepoFile) and each.path == path), None)

    def files(self, commit: str, folder: str) -> list[str]:
        """Paths of all files below a folder; none where there is no such folder."""
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with self._calling(f"list {folder}"):
            try:
                tree = self.api.list_repo_tree(self.repository, folder, recursive=True, revision=commit)
                entries = list(islice(tree, MAX_LISTED_FILES + 1))
            except EntryNotFoundError:
                return []
            if len(entries) > MAX_LISTED_FILES:
                raise StoreError(f"{self.address}: {folder} has more than {MAX_LISTED_FILES} files")
            return [each.path for each in entries if isinstance(each, RepoFile)]

    def read(self, commit: str, path: str, limit: int) -> bytes | None:
        """The bytes of a small file, None where there is no such file."""
        from huggingface_hub.errors import EntryNotFoundError

        buffer = io.BytesIO()
        try:
            self.fetch(commit, path, buffer, limit, lambda count: None)
        except StoreError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return None
            raise
        return buffer.getvalue()

    def fetch(
        self, commit: str, path: str, target: BinaryIO, limit: int, progress: Progress, size: int | None = None
    ) -> None:
        """Append to `target` what it does not have yet of a file.

        Args:
            limit: of its size in bytes; more is not written.
            size: its exact size in bytes, where that is known.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, path, revision=commit, endpoint=self.api.endpoint)
        headers = build_hf_headers(library_name="reft-plugins", headers={"Accept-Encoding": "identity"})
        bounded = cast(BinaryIO, _Bounded(target, limit, f"{self.address}: {path}", progress))
        start = target.seek(0, os.SEEK_END)
        if start > limit:
            start = target.seek(0)
            target.truncate()
        with self._calling(f"download {path}"):
            http_get(url, bounded, resume_size=start, headers=headers, expected_size=size, displayed_filename=path)

    def cached(self, commit: str, path: str) -> Path | None:
        """The file in the user's own cache of the Hub, if that has it."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, path, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def upload(self, operation: CommitOperationAdd) -> None:
        """Send the content of a large file ahead of the commit that names it; nothing is sent that the Hub has."""
        with self._calling(f"upload {operation.path_in_repo}"):
            self.api.preupload_lfs_files(self.repository, [operation], free_memory=False)

    def commit(self, operations: Sequence[CommitOperationAdd], message: str, branch: str, parent: str) -> str:
        """Put files into a branch that still points to commit `parent`; the new commit's id."""
        with self._calling(f"commit to {branch}"):
            done = self.api.create_commit(
                self.repository, operations, commit_message=message, revision=branch, parent_commit=parent
            )
            return str(done.oid)

    def branch(self, branch: str, commit: str) -> None:
        """Make a branch."""
        with self._calling(f"make the branch {branch}"):
            self.api.create_branch(self.repository, branch=branch, revision=commit)

    def delete_branch(self, branch: str) -> None:
        """Remove a branch; commits that a tag names stay."""
        with self._calling(f"remove the branch {branch}"):
            self.api.delete_branch(self.repository, branch=branch)

    def tag(self, tag: str, commit: str) -> None:
        """Make a tag, which is not there yet."""
        with self._calling(f"make the tag {tag}"):
            self.api.create_tag(self.repository, tag=tag, revision=commit)

    def delete_tag(self, tag: str) -> None:
        """Remove a tag."""
        with self._calling(f"remove the tag {tag}"):
            self.api.delete_tag(self.repository, tag=tag)

    @contextmanager
    def _calling(self, action: str) -> Iterator[None]:
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

        failed = f"{self.address}: cannot {action}"
        try:
            with _MANNERS:
                yield
        except ReftError:
            raise
        except RepositoryNotFoundError as error:
            raise StoreError(
                f"{failed}: {self.api.endpoint} has no such repository, or this login may not see it. {_LOGIN}"
            ) from error
        except OfflineModeIsEnabled as error:
            raise StoreError(f"{failed}: HF_HUB_OFFLINE forbids it. Unset it") from error
        except Exception as error:  # of whatever kind: the answers of a server are not in our hands
            refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if isinstance(refusal, HfHubHTTPError):
                kind = UnreachableError if _passes(refusal.response.status_code) else StoreError
                raise kind(f"{failed}: {_advice(refusal)}") from error
            kind = StoreError if isinstance(error, _MALFORMED) else UnreachableError
            raise kind(f"{failed}: {type(error).__name__}: {_line(str(error))}. Try again") from error


class _Bounded:
    """A file that takes at most `limit` bytes and counts them, for a library that writes what a server sends."""

    def __init__(self, file: BinaryIO, limit: int, where: str, progress: Progress) -> None:
        self.file, self.limit, self.where, self.progress = file, limit, where, progress
        self.tell = file.tell
        self.seek = file.seek
        self.truncate = file.truncate

    def write(self, chunk: bytes) -> int:
        if self.file.tell() + len(chunk) > self.limit:
            raise StoreError(f"{self.where}: more than {self.limit} bytes, so it is not read further")
        try:
            written = self.file.write(chunk)
        except OSError as error:
            raise StoreError(f"{self.where}: cannot keep what arrives: {error.strerror}") from error
        self.progress(written)
        return written


class _Manners:
    """The library's own progress bars are off and its patience ends, while any thread of ours uses it.

    Both are settings of the whole process there; the last thread to leave puts them back.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._inside = 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._mutex:
            if self._inside == 0:
                self._undo.enter_context(_quiet_and_patient())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            self._inside -= 1
            if self._inside == 0:
                self._undo.close()


_MANNERS = _Manners()


@contextmanager
def _quiet_and_patient() -> Iterator[None]:
    """No progress bars of the library's own; and a limit to its patience, where it has none."""
    from huggingface_hub import utils

    loud = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    session = utils.get_session()  # type: ignore[attr-defined]
    timeout = getattr(session, "timeout", None)  # before version 1.0 of the library there is none
    if loud:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    if timeout is not None and set(timeout.as_dict().values()) == {None}:
        session.timeout = TIMEOUT_SECONDS
    try:
        yield
    finally:
        if timeout is not None:
            session.timeout = timeout
        if loud:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _advice(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f"it answers {status} ({_line(error.server_message or str(error))})"
    if status == 401:
        return f"{said}. {_LOGIN}"
    if status == 403:
        return f"{said}. The login needs the permission to write there"
    if status in (409, 412):
        return f"{said}: somebody else changed the repository meanwhile. Try again"
    return f"{said}. Try again later" if _passes(status) else said


def _passes(status: int) -> bool:
    """Whether another attempt may get another answer."""
    return status in (408, 429) or status >= 500


def _line(text: str) -> str:
    """One printable line of bounded length."""
    words = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in words)[:300].rstrip(".")
