from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.trust.keys import PublicKey, generate, read_public_keys

Keys = Callable[[str], tuple[Path, PublicKey]]
Policy = Callable[..., Path]


@pytest.fixture(autouse=True)
def nobody_elses_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFT_POLICY", raising=False)
    monkeypatch.delenv("REFT_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-configuration"))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """A key pair by name, made once: the private key's file, and the public key."""
    made: dict[str, tuple[Path, PublicKey]] = {}

    def pair(name: str) -> tuple[Path, PublicKey]:
        if name not in made:
            private, public = generate(tmp_path / f"{name}.pem")
            made[name] = private, read_public_keys([public])[0]
        return made[name]

    return pair


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """Writes a policy beside the keys and makes it the one that holds."""

    def write(text: str, name: str = "policy.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setenv("REFT_POLICY", str(path))
        return path

    return write
