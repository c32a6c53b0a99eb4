"""What a policy file says, and that nothing is admitted where it says nothing that is understood."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.trust.keys import PublicKey
from adapters_store.trust.policy import active, load
from reft_plugins.errors import StoreError, UntrustedError

Keys = Callable[[str], tuple[Path, PublicKey]]
Policy = Callable[..., Path]

RULES = """
[[rules]]
names = ["prod/*", "sentiment"]
keys = ["release.pub", "audit.pub"]
at_least = 2

[[rules]]
names = ["prod/*", "*-test"]
allow_unsigned = true
"""


def test_the_first_rule_that_matches_decides(keys: Keys, policy: Policy) -> None:
    (_, release), (_, audit) = keys("release"), keys("audit")
    found = load(policy(RULES))
    for name in ("prod/a", "prod/a/b-test", "sentiment"):
        rule = found.rule_for(name)
        assert (rule.number, rule.verdict, rule.at_least, rule.keys) == (1, "signed", 2, (release, audit))
    assert found.rule_for("a-test").verdict == "allow"
    for name in ("production/a", "prod", "sentiment2", "a-test2", "x"):
        assert found.rule_for(name).verdict == "refuse"
    assert load(policy('default = "allow"\n' + RULES)).rule_for("x").verdict == "allow"
    assert load(policy("")).rule_for("x").verdict == "refuse"


def test_keys_written_into_the_policy(keys: Keys, policy: Policy) -> None:
    _, release = keys("release")
    inline = f'[[rules]]\nnames = ["*"]\nkeys = ["""\n{release.pem}"""]\n'
    (key,) = load(policy(inline)).rule_for("x").keys
    assert (key.id, key.label) == (release.id, "key 1 of rule 1")


def test_a_key_listed_twice_is_one_key(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    _, release = keys("release")
    (tmp_path / "copy.pub").write_text(release.pem)
    (tmp_path / "link.pub").symlink_to("release.pub")
    rule = '[[rules]]\nnames = ["*"]\nkeys = ["release.pub", "copy.pub", "link.pub"]\n'
    assert load(policy(rule)).rule_for("x").keys == (release,)
    with pytest.raises(UntrustedError, match=r"at_least = 2, but it lists 1 different key"):
        load(policy(rule + "at_least = 2\n"))


def test_the_digest_covers_text_and_keys(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    keys("release"), keys("audit")
    first = load(policy(RULES)).digest
    assert load(policy(RULES)).digest == first
    assert load(policy(RULES + "# words")).digest != first
    keys("other")
    (tmp_path / "other.pub").replace(tmp_path / "audit.pub")
    assert load(policy(RULES)).digest != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default = 'deny'", "default"),
        ("defaults = 'allow'", "defaults"),
        ("[[rules]]\nnames = ['*']", "either keys or allow_unsigned"),
        ("[[rules]]\nnames = ['*']\nkeys = []", "either keys or allow_unsigned"),
        ("[[rules]]\nnames = ['*']\nkeys = ['release.pub']\nallow_unsigned = true", "either keys or allow_unsigned"),
        ("[[rules]]\nnames = ['*']\nallow_unsigned = true\nat_least = 1", "at_least has no meaning"),
        ("[[rules]]\nnames = ['*']\nallow_unsigned = 'true'", "allow_unsigned"),
        ("[[rules]]\nnames = ['*']\nkeys = ['release.pub']\nat_least = 0", "at_least"),
        ("[[rules]]\nnames = ['*']\nkeys = ['release.pub']\nat_least = 1.0", "at_least"),
        ("[[rules]]\nnames = ['*']\nkeys = ['release.pub']\natleast = 2", "'rules.1.atleast'. Did you mean 'at_least'"),
        ("[[rule]]\nnames = ['*']\nkeys = ['release.pub']", "unknown key 'rule'. Did you mean 'rules'"),
        ("[[rules]]\nnames = []\nkeys = ['release.pub']", "names"),
        ("[[rules]]\nnames = '*'\nkeys = ['release.pub']", "names"),
        ("[[rules]]\nnames = ['Prod/*']\nkeys = ['release.pub']", "rules.1.names.1: 'Prod/.*' matches no name: [^;]*$"),
        ("[[rules]]\nnames = ['prod/* ']\nkeys = ['release.pub']", "names"),
        ("[[rules]]\nnames = ['*']\nkeys = ['missing.pub']", r"missing\.pub: cannot be read"),
        ("[[rules]]\nnames = ['*']\nkeys = ['.']", "regular file|directory"),
        ("[[rules]]\nnames = ['*']\nkeys = ['release.pem']", "is a private key"),
        ("[[rules]]\nnames = ['*']\nkeys = ['-----BEGIN PUBLIC KEY-----']", "no public key"),
        ('[[rules]]\nnames = ["*"]\nkeys = ["a\\u0000b"]', "no path"),
        ("default = 'allow'\ndefault = 'allow'", "not readable TOML"),
        ("[[rules]", "not readable TOML"),
        ("x = " + "[" * 5000, "not readable TOML"),
        ("#" * 300_000, "larger than the limit"),
    ],
)
def test_a_policy_with_a_mistake_admits_nothing(keys: Keys, policy: Policy, text: str, message: str) -> None:
    keys("release")
    policy(text)
    with pytest.raises(UntrustedError, match=message) as raised:
        active()
    assert "Nothing is admitted" in str(raised.value)


def test_files_that_cannot_be_the_policy(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    path = policy(RULES)
    keys("release"), keys("audit")
    assert active() is not None
    path.chmod(0o666)
    with pytest.raises(UntrustedError, match="everybody on this machine may write"):
        active()
    path.unlink()
    with pytest.raises(UntrustedError, match="No such file"):
        active()
    path.mkdir()
    with pytest.raises(UntrustedError):
        active()
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(UntrustedError):
        active()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UntrustedError, match="regular"):
        active()
    path.unlink()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UntrustedError, match="not readable TOML"):
        active()
    (tmp_path / "real.toml").write_text(RULES)
    path.unlink()
    path.symlink_to("real.toml")
    assert active() is not None


def test_which_policy_holds(keys: Keys, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert active() is None
    configuration = tmp_path / "config.toml"
    configuration.write_text("[trust]\npolicy = 'configured.toml'\n")
    (tmp_path / "configured.toml").write_text("default = 'allow'")
    monkeypatch.setenv("REFT_CONFIG", str(configuration))
    found = active()
    assert found is not None
    assert found.path == tmp_path / "configured.toml"
    chosen = policy("default = 'refuse'", "chosen.toml")
    found = active()
    assert found is not None
    assert found.path == chosen
    monkeypatch.setenv("REFT_POLICY", "")
    found = active()
    assert found is not None
    assert found.path.name == "configured.toml"
    (tmp_path / "configured.toml").unlink()
    with pytest.raises(UntrustedError):
        active()
    configuration.write_text("[trust]\npolicies = 'configured.toml'\n")
    with pytest.raises(StoreError, match="policies"):
        active()
