from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store.configuration import Configuration, configuration, location
from adapters_store.diagnosis import diagnose
from adapters_store.location import default_path
from reft_plugins.diagnosis import Finding
from reft_plugins.errors import StoreError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file, to be written, which is the one in force."""
    for variable in ("REFT_STORE", "REFT_POLICY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("REFT_CONFIG", str(tmp_path / "chosen.toml"))
    return tmp_path / "chosen.toml"


def test_everything_it_may_say(file: Path, tmp_path: Path) -> None:
    file.write_text(
        '[store]\npath = "adapters"\nremotes = ["oci://registry.example/team", "hf://owner/adapters"]\nrefresh = 90\n'
        '[trust]\npolicy = "/etc/reft/policy.toml"\n'
    )
    assert configuration() == Configuration(
        file=file,
        store=tmp_path / "adapters",
        remotes=("oci://registry.example/team", "hf://owner/adapters"),
        refresh=90.0,
        policy=Path("/etc/reft/policy.toml"),
    )
    file.write_text("")
    assert configuration() == Configuration(file=file)


@pytest.mark.parametrize(("text", "seconds"), [('"never"', math.inf), ('"always"', 0.0), ("0", 0.0), ("2.5", 2.5)])
def test_when_a_tag_is_looked_up_again(file: Path, text: str, seconds: float) -> None:
    file.write_text(f"[store]\nrefresh = {text}\n")
    assert configuration().refresh == seconds


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REFT_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert location() == tmp_path / "xdg/reft/config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert location() == tmp_path / "home/.config/reft/config.toml"
    assert configuration() == Configuration()
    location().parent.mkdir(parents=True)
    location().write_text('[store]\npath = "~/mine"\n')
    assert configuration().store == tmp_path / "home/mine"


def test_where_the_store_is(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    file.write_text("")
    assert default_path() == tmp_path / "data/reft/store"
    file.write_text('[store]\npath = "configured"\n')
    assert default_path() == tmp_path / "configured"
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "variable"))
    assert default_path() == tmp_path / "variable"
    file.write_text("[")
    assert default_path() == tmp_path / "variable"


WRONG = {
    "[stor]": r"unknown key 'stor'. Did you mean 'store'\?",
    "[store]\nremote = []": r"unknown key 'store.remote'. Did you mean 'remotes'\?",
    "[trust]\nwhatever = 1": "unknown key 'trust.whatever'. Known are policy",
    "[store]\npath = 5": "store.path: Input should be a valid string",
    '[store]\npath = ""': "store.path",
    '[store]\npath = "~no-such-user/x"': "no-such-user",
    '[store]\nrefresh = "sometimes"': "'sometimes' is neither",
    "[store]\nrefresh = -1": "-1 is neither",
    "[store]\nrefresh = true": "True is neither",
    "[store]\nrefresh = inf": "inf is neither",
    '[store]\nremotes = "oci://x/y"': "store.remotes: Input should be a valid list",
    '[store]\nremotes = ["x/y"]': "store.remotes.1: 'x/y' is no address",
    "store = 1": "store: ",
    "[store": "not readable TOML",
    "[store]\n[store]": "not readable TOML",
    "[trust]\npolicy = 1": "trust.policy",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_an_error_that_names_it(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(StoreError, match=rf"chosen\.toml: .*{WRONG[text]}"):
        default_path()


def test_an_unreadable_file_is_an_error_that_names_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        with pytest.raises(StoreError, match=r"chosen\.toml"):
            configuration()

    refused()  # REFT_CONFIG names it, and it is not there
    file.mkdir()
    refused()
    file.rmdir()
    os.mkfifo(file)
    refused()
    file.unlink()
    file.write_bytes(b"\xff")
    refused()
    file.write_bytes(b"#" * (1024 * 1024 + 1))
    refused()
    monkeypatch.setenv("REFT_CONFIG", os.devnull)
    assert configuration() == Configuration(file=Path(os.devnull))


def test_a_link_into_nothing_is_not_the_same_as_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REFT_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    location().parent.mkdir()
    location().symlink_to(tmp_path / "gone")
    with pytest.raises(StoreError, match="does not exist"):
        configuration()


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("[store]\nrefresh = 1\n")
    assert configuration().refresh == 1
    first = configuration()
    assert configuration() is first
    file.write_text("[store]\nrefresh = 22\n")
    assert configuration().refresh == 22


def test_without_a_file_nothing_heavy_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom adapters_store.location import default_path\ndefault_path()\n"
        "print(sorted({'pydantic', 'tomllib', 'torch', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    for variable in ("REFT_STORE", "REFT_CONFIG", "XDG_CONFIG_HOME"):
        environment.pop(variable, None)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() in ("[]", "['tomllib']")


def _findings() -> dict[str, Finding]:
    found: list[Finding] = []
    diagnose(found.append)
    return {finding.name: finding for finding in found}


def test_the_diagnosis_shows_what_is_in_force(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[store]\npath = "s"\nremotes = ["oci://registry.example/team"]\nrefresh = 60\n')
    found = _findings()
    assert found["configuration"].detail == str(file)
    assert found["store"].status == "missing" and str(tmp_path / "s") in found["store"].detail
    assert found["store remotes"].detail == "oci://registry.example/team; tags are looked up there every 60 s"
    assert "none" in found["trust policy"].detail
    file.write_text('[trust]\npolicy = "p"\n')
    assert "no network" in _findings()["store remotes"].detail
    assert _findings()["trust policy"].status == "broken"
    (tmp_path / "p").write_text("")
    said = f"{tmp_path / 'p'}: 0 rules; other names are refused"
    assert _findings()["trust policy"] == Finding("trust policy", "ok", said)
    (tmp_path / "p").write_text("defaults = 1")
    assert "defaults" in _findings()["trust policy"].detail
    monkeypatch.setenv("REFT_POLICY", str(tmp_path / "other"))
    assert _findings()["trust policy"].status == "broken"
    file.write_text("nonsense")
    assert [(name, finding.status) for name, finding in _findings().items()] == [("configuration", "broken")]
