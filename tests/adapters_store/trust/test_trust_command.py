from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_variants import flip_bit
from click.testing import CliRunner, Result

from adapters_store import Store
from adapters_store.commands import store as group
from adapters_store.trust.keys import PublicKey
from adapters_store.trust.signing import sign, sound_files
from reft_plugins.errors import StoreError, UnknownReferenceError, UntrustedError

Keys = Callable[[str], tuple[Path, PublicKey]]
Policy = Callable[..., Path]

RULES = '[[rules]]\nnames = ["sentiment"]\nkeys = ["release.pub"]\n'


@pytest.fixture
def filled(store: Store, adapters: list[Path]) -> Store:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:latest")
    return store


def _run(*arguments: object, input: str | None = None) -> Result:
    return CliRunner().invoke(group, [str(each) for each in arguments], input=input)


def _json(result: Result) -> Any:
    return json.loads(result.stdout)


def test_the_journey(filled: Store, tmp_path: Path) -> None:
    private, public = tmp_path / "release.pem", tmp_path / "release.pub"
    made = _run("keygen", private)
    assert made.exit_code == 0
    assert str(public) in made.stdout
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert _run("verify", "sentiment@v1").stdout == "sentiment@v1: sound; 0 signatures\n"
    unsigned = _run("verify", "sentiment@v1", "--key", public)
    assert (unsigned.exit_code, unsigned.stdout) == (1, "sentiment@v1: not signed: carries no signature\n")
    signed = _run("sign", "sentiment@v1", "--key", private)
    assert (signed.exit_code, signed.stdout.split()[:2]) == (0, ["signed", "sentiment@v1"])
    assert "1 signature, not checked" in _run("verify", "sentiment@v1").stdout
    verified = _run("verify", "sentiment@v1", "--key", public)
    assert (verified.exit_code, verified.stdout.split("(")[0]) == (0, f"sentiment@v1: signed by {public} ")
    everything = _run("verify", "--key", public)
    assert everything.exit_code == 1
    assert "sentiment@v2: not signed: carries no signature" in everything.stdout
    assert "everything is sound; 1 version signed, 1 not" in everything.stdout
    assert _run("sign", "sentiment:latest", "--key", private).exit_code == 0
    everything = _run("verify", "--key", public)
    assert (everything.exit_code, everything.stdout.count("not signed")) == (0, 0)


def test_json(filled: Store, tmp_path: Path) -> None:
    private, public = tmp_path / "release.pem", tmp_path / "release.pub"
    key = _json(_run("keygen", private, "--json"))
    assert (key["private"], key["public"], len(key["id"])) == (str(private), str(public), 64)
    signed = _json(_run("sign", "sentiment:latest", "--key", private, "--json"))
    assert (signed["reference"], signed["subject"]) == ("sentiment@v2", filled.find("sentiment@v2").digest)
    verdict = _json(_run("verify", "sentiment:latest", "--key", public, "--json"))
    assert (verdict["ok"], verdict["signatures"][0]["key"]["id"]) == (True, key["id"])
    everything = _run("verify", "--key", public, "--json")
    assert everything.exit_code == 1
    report = _json(everything)
    assert (report["ok"], [each["ok"] for each in report["signatures"]]) == (False, [False, True])
    one = _json(_run("verify", "sentiment@v1", "--json"))
    assert one["files"] == sound_files(filled, "sentiment@v1")
    assert "signatures" not in _json(_run("verify", "--json"))


def test_passwords(filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "release.pem"
    made = _run("keygen", private, "--password", input="secret\nsecret\n")
    assert made.exit_code == 0
    assert "secret" not in made.output
    without = _run("sign", "sentiment@v1", "--key", private)
    assert isinstance(without.exception, StoreError)
    assert "REFT_KEY_PASSWORD" in str(without.exception)
    wrong = _run("sign", "sentiment@v1", "--key", private, "--password", input="wrong\n")
    assert "cannot be opened with this password" in str(wrong.exception)
    assert _run("sign", "sentiment@v1", "--key", private, "--password", input="secret\n").exit_code == 0
    monkeypatch.setenv("REFT_KEY_PASSWORD", "secret")
    assert _run("sign", "sentiment@v2", "--key", private).exit_code == 0
    assert _run("verify", "--key", tmp_path / "release.pub").exit_code == 0


def test_damaged_content(filled: Store, keys: Keys) -> None:
    private, public = keys("release")
    sign(filled, "sentiment@v1", private)
    digest = sound_files(filled, "sentiment@v1")["adapter.safetensors"].removeprefix("sha256:")
    flip_bit(filled.root / "blobs" / "sha256" / digest)
    one = _run("verify", "sentiment@v1", "--key", public.label)
    assert isinstance(one.exception, StoreError)
    assert digest in str(one.exception)
    everything = _run("verify", "--key", public.label)
    assert everything.exit_code == 1
    assert "1 problem; signatures were not looked at" in everything.stdout


def test_policy_check(filled: Store, keys: Keys, policy: Policy, adapters: list[Path]) -> None:
    private, _ = keys("release")
    filled.add(adapters[2], "scratch:x")
    nothing = _run("policy", "check", "scratch:x")
    assert (nothing.exit_code, "no policy: set REFT_POLICY" in nothing.stdout) == (0, True)
    path = policy(RULES)
    sign(filled, "sentiment@v2", private)
    good = _run("policy", "check", "sentiment:latest")
    assert good.exit_code == 0
    assert "sentiment@v2: admitted by rule 1 for 'sentiment' (which has to be signed by the key" in good.stdout
    everything = _run("policy", "check")
    assert everything.exit_code == 1
    assert "sentiment@v1: refused: " in everything.stdout
    assert "scratch@v1: refused: " in everything.stdout
    assert f"1 version admitted, 2 refused by policy {path}" in everything.stdout
    found = _json(_run("policy", "check", "--json"))
    assert found["policy"]["path"] == str(path)
    assert [(each["reference"], each["admitted"]) for each in found["versions"]] == [
        ("scratch@v1", False),
        ("sentiment@v1", False),
        ("sentiment@v2", True),
    ]
    assert isinstance(_run("policy", "check", "sentiment:nope").exception, UnknownReferenceError)
    policy(RULES + "x")
    assert isinstance(_run("policy", "check").exception, UntrustedError)


def test_checkout_asks_the_policy_unless_told_otherwise(filled: Store, policy: Policy, tmp_path: Path) -> None:
    policy("")
    target = tmp_path / "copy"
    for options in ((), ("--to", target)):
        assert isinstance(_run("checkout", "sentiment:latest", *options).exception, UntrustedError)
        assert not target.exists()
        assert _run("checkout", "sentiment:latest", *options, "--unchecked").exit_code == 0
    assert (target / "adapter.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("keygen",),
        ("keygen", "."),
        ("sign", "sentiment@v1"),
        ("sign", "sentiment@v1", "--key", "missing.pem"),
        ("sign", "A:x", "--key", "."),
        ("verify", "A:x"),
        ("verify", "--key", "missing.pub"),
        ("policy",),
        ("policy", "check", "A:x"),
        ("policy", "set"),
    ],
)
def test_wrong_use_exits_with_2(filled: Store, arguments: tuple[str, ...]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Usage: " in result.output
