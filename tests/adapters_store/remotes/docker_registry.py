"""Debian's `docker-registry` on loopback, in a folder of its own, and `skopeo`: programs that know nothing of us."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import requests

USER, PASSWORD = "team", "open sesame"
_HTPASSWD = f"{USER}:$2b$04$4PYdj2g4mU04PkBqEbocX..7PWfdlToEG2UXYWszJAd/ycAbw.GlC\n"
_START_SECONDS = 30


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class DockerRegistry:
    """A registry that can be killed and started again on the same port and folder."""

    def __init__(self, folder: Path, login: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        (folder / "htpasswd").write_text(_HTPASSWD)
        auth = f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n" if login else ""
        (folder / "config.yml").write_text(
            "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {folder}/data}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{self.host}'}}\n{auth}"
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def address(self, prefix: str) -> str:
        return f"oci://{self.host}/{prefix}"

    def start(self) -> None:
        program = shutil.which("docker-registry")
        assert program is not None
        with (self.folder / "log").open("ab") as log:
            environment = {**os.environ, "GOMAXPROCS": "1", "OTEL_TRACES_EXPORTER": "none"}
            self._process = subprocess.Popen(
                [program, "serve", str(self.folder / "config.yml")], stdout=log, stderr=log, env=environment
            )
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                requests.get(f"http://{self.host}/v2/", timeout=5)
                return
            except requests.ConnectionError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < end, "docker-registry does not start"
                time.sleep(0.05)

    def kill(self) -> None:
        """As a power cut does it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            self._process = None

    def stored(self, repository: str) -> set[str]:
        """The digests of the blobs that are whole and part of a repository."""
        layers = self.folder / "data/docker/registry/v2/repositories" / repository / "_layers/sha256"
        return {f"sha256:{path.name}" for path in layers.glob("*")}


def skopeo(*arguments: object) -> str:
    command = ["skopeo", "--insecure-policy", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def skopeo_json(*arguments: object) -> Any:
    return json.loads(skopeo(*arguments))
