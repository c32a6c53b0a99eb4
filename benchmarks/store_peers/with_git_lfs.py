"""git with LFS: a folder per name, a commit and a tag per version.

A resolve is `git archive` of a tag's folder, unpacked; neither git-lfs nor git verifies the tensors then. An `add` is a
copy into the work tree, `git add`, `git commit` and two tags. git waits for the disk for everything that it writes
itself (`core.fsync=all`); git-lfs syncs nothing that it stores.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

from store_peers.clock import Clock, main
from store_peers.plan import Plan, Version, sha256_of

AUTHOR = "Benchmark <benchmark@example.org>"
EPOCH = 1_700_000_000
ENVIRONMENT = {
    **os.environ,
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_LFS_SKIP_SMUDGE": "0",
    "GIT_AUTHOR_NAME": "Benchmark",
    "GIT_AUTHOR_EMAIL": "benchmark@example.org",
    "GIT_COMMITTER_NAME": "Benchmark",
    "GIT_COMMITTER_EMAIL": "benchmark@example.org",
}


def git(job: dict[str, Any], *words: str, **settings: Any) -> bytes:
    found = subprocess.run(
        ["git", "-C", job["store"], *words], check=True, stdout=subprocess.PIPE, env={**ENVIRONMENT, **settings}
    )
    return found.stdout


def fill(job: dict[str, Any], clock: Clock) -> None:
    """All commits and tags by `git fast-import`, the tensors put where git-lfs keeps them."""
    plan = Plan(**job["plan"])
    Path(job["store"]).mkdir()
    git(job, "init", "-q", "-b", "main")
    git(job, "lfs", "install", "--local")
    git(job, "config", "gc.auto", "0")
    pointers: dict[Path, bytes] = {}
    with subprocess.Popen(
        ["git", "-C", job["store"], "fast-import", "--quiet"], stdin=subprocess.PIPE, env=ENVIRONMENT
    ) as importer:
        write_history(job, plan, pointers, importer.stdin)  # type: ignore[arg-type]
    if importer.returncode:
        raise SystemExit("git fast-import failed")
    git(job, "pack-refs", "--all")
    git(job, "config", "core.fsync", "all")
    git(job, "reset", "-q", "--hard", "main", GIT_LFS_SKIP_SMUDGE="1")


def write_history(job: dict[str, Any], plan: Plan, pointers: dict[Path, bytes], stream: IO[bytes]) -> None:
    manifests: dict[tuple[str, int], str] = {}
    for position, version in enumerate(plan.all()):
        tensors = plan.tensors(version)
        if tensors not in pointers:
            pointers[tensors] = keep(job, tensors)
        files = {"adapter.json": plan.manifest(version, manifests), "adapter.safetensors": pointers[tensors]}
        text = [f"commit refs/heads/main\ncommitter {AUTHOR} {EPOCH + position} +0000\n".encode()]
        text += [data(version.note.encode())]
        if position == 0:
            text += [b"M 100644 inline .gitattributes\n", data(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")]
        for name, content in files.items():
            text += [f"M 100644 inline {version.name}/{name}\n".encode(), data(content)]
        text += [f"reset refs/tags/{version.name}/v{version.number}\nfrom refs/heads/main\n\n".encode()]
        stream.write(b"".join(text))
    for name, tag, number in plan.tags():
        stream.write(f"reset refs/tags/{name}/{tag}\nfrom refs/tags/{name}/v{number}\n\n".encode())


def data(content: bytes) -> bytes:
    return b"data %d\n%s\n" % (len(content), content)


def keep(job: dict[str, Any], tensors: Path) -> bytes:
    """Put a file among git-lfs's objects; gives its pointer."""
    digest = sha256_of(tensors)
    target = Path(job["store"]) / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tensors, target)
    size = tensors.stat().st_size
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()


def measure(job: dict[str, Any], clock: Clock) -> None:
    """One round; every command is a new process."""
    plan = Plan(**job["plan"])
    for operation in ("ls, new process", "ls, again"):
        with clock.time(operation):
            listed = git(job, "for-each-ref", "--format=%(refname:short) %(objectname) %(creatordate)", "refs/tags")
        if len(listed.splitlines()) < plan.versions:
            raise SystemExit("git lists too few tags")
    for kind in ("tiny", "large"):
        sample = plan.sample(kind, job["sample"], 0)
        for version in random.Random(job["round"]).choices(sample, k=job["resolves"]):
            with tempfile.TemporaryDirectory(dir=job["scratch"]) as target:
                with clock.time(f"resolve, {kind}"):
                    resolve(job, version, target)
                if sha256_of(Path(target) / version.name / "adapter.safetensors") != sha256_of(plan.tensors(version)):
                    raise SystemExit(f"{version.reference}: other tensors")
    for version in plan.sample("tiny", job["tags"], job["round"]):
        with clock.time("tag"):
            git(job, "tag", "-f", f"{version.name}/prod", f"{version.name}/v{version.number}")
    add(job, clock, plan)


def resolve(job: dict[str, Any], version: Version, target: str) -> None:
    archive = ["git", "-C", job["store"], "archive", f"{version.name}/v{version.number}", version.name]
    with subprocess.Popen(archive, stdout=subprocess.PIPE, env=ENVIRONMENT) as source:
        subprocess.run(["tar", "x", "-C", target], stdin=source.stdout, check=True)


def add(job: dict[str, Any], clock: Clock, plan: Plan) -> None:
    for source, name, kind in job["adds"]:
        pattern = f"refs/tags/{name}/v*"
        number = len(git(job, "for-each-ref", pattern).splitlines()) + 1
        with clock.time(f"add, {kind}"):
            shutil.copytree(source, Path(job["store"]) / name, dirs_exist_ok=True)
            git(job, "add", name)
            git(job, "commit", "-q", "-m", "a version")
            git(job, "tag", f"{name}/v{number}")
            git(job, "tag", "-f", f"{name}/newest")


if __name__ == "__main__":
    main({"fill": fill, "measure": measure})
