"""The policy decides what runtimes get; whatever is missing, wrong or damaged, they get nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_variants import flip_bit

import reft_plugins as reft
from adapters_store import Store
from adapters_store.layout.oci import SIGNATURE_TYPE
from adapters_store.resolve import resolve
from adapters_store.trust import admission
from adapters_store.trust.bundles import BUNDLE_TYPE
from adapters_store.trust.keys import PublicKey
from adapters_store.trust.signing import SIGNATURE_FILE, Verdict, judge, sign
from reft_plugins.errors import UntrustedError

Keys = Callable[[str], tuple[Path, PublicKey]]
Policy = Callable[..., Path]

RELEASE = '[[rules]]\nnames = ["sentiment", "prod/*"]\nkeys = ["release.pub"]\n'


@pytest.fixture
def filled(store: Store, adapters: list[Path], keys: Keys) -> Store:
    keys("release"), keys("audit")
    store.add(adapters[0], "sentiment:latest")
    return store


def _refused(store: Store, reference: str, message: str) -> None:
    """By every way that an adapter of the store takes into a runtime."""
    for way in (resolve, reft.load, store.resolve, store.checkout):
        with pytest.raises(UntrustedError, match=message):
            way(reference)
    with pytest.raises(UntrustedError, match=message), store.hold(reference):
        pass


def _admitted(store: Store, reference: str) -> None:
    folder = store.resolve(reference)
    assert folder is not None
    assert folder == resolve(reference) == store.checkout(reference)
    assert reft.load(reference).manifest.method == "loreft"
    with store.hold(reference) as held:
        assert held == folder


def test_without_a_policy_everything_is_admitted(filled: Store) -> None:
    _admitted(filled, "sentiment:latest")


def test_unsigned(filled: Store, policy: Policy) -> None:
    policy(RELEASE)
    _refused(filled, "sentiment:latest", r"policy\.toml, rule 1 for 'sentiment'.*carries no signature.*reft store sign")
    assert filled.checkout("sentiment:latest", unchecked=True).is_dir()


def test_signed(filled: Store, policy: Policy, keys: Keys) -> None:
    policy(RELEASE)
    sign(filled, "sentiment:latest", keys("release")[0])
    for reference in ("sentiment:latest", "sentiment@v1", f"sentiment@{filled.find('sentiment@v1').digest}"):
        _admitted(filled, reference)


def test_signed_by_a_key_that_is_not_listed(filled: Store, policy: Policy, keys: Keys) -> None:
    policy(RELEASE)
    sign(filled, "sentiment:latest", keys("audit")[0])
    _refused(filled, "sentiment:latest", "signed by another key")


def test_a_key_that_is_no_longer_listed(filled: Store, policy: Policy, keys: Keys, tmp_path: Path) -> None:
    policy(RELEASE)
    sign(filled, "sentiment:latest", keys("release")[0])
    _admitted(filled, "sentiment:latest")
    policy(RELEASE.replace("release", "audit"))
    _refused(filled, "sentiment:latest", "signed by another key")
    policy(RELEASE)
    _admitted(filled, "sentiment:latest")
    (tmp_path / "release.pub").write_text(keys("audit")[1].pem)
    _refused(filled, "sentiment:latest", "signed by another key")
    (tmp_path / "release.pub").unlink()
    _refused(filled, "sentiment:latest", r"release\.pub: cannot be read")


def test_two_of_two(filled: Store, policy: Policy, keys: Keys) -> None:
    policy(RELEASE.replace('"release.pub"', '"release.pub", "audit.pub"') + "at_least = 2\n")
    for _ in range(2):
        sign(filled, "sentiment:latest", keys("release")[0])
    _refused(filled, "sentiment:latest", r"signed by 2 of the keys .*audit\.pub.*: signed by .*release\.pub")
    sign(filled, "sentiment:latest", keys("audit")[0])
    _admitted(filled, "sentiment:latest")


def test_one_of_two(filled: Store, policy: Policy, keys: Keys) -> None:
    policy(RELEASE.replace('"release.pub"', '"release.pub", "audit.pub"'))
    sign(filled, "sentiment:latest", keys("audit")[0])
    _admitted(filled, "sentiment:latest")


def test_names_without_a_rule(filled: Store, policy: Policy, adapters: list[Path]) -> None:
    filled.add(adapters[0], "scratch:x")
    policy(RELEASE)
    _refused(filled, "scratch:x", "no rule that admits the name 'scratch'")
    policy("default = 'allow'\n" + RELEASE)
    _admitted(filled, "scratch:x")
    _refused(filled, "sentiment:latest", "carries no signature")
    policy(RELEASE + '[[rules]]\nnames = ["scr*"]\nallow_unsigned = true\n')
    _admitted(filled, "scratch:x")


@pytest.mark.parametrize("name", ["prod/a.b_c--d/e-f", "prod/" + "x" * 190, "prod/0"])
def test_unusual_names(filled: Store, policy: Policy, keys: Keys, adapters: list[Path], name: str) -> None:
    policy("default = 'allow'\n" + RELEASE)
    filled.add(adapters[1], f"{name}:latest")
    _refused(filled, f"{name}:latest", "carries no signature")
    sign(filled, f"{name}:latest", keys("release")[0])
    _admitted(filled, f"{name}:latest")


def test_replayed_from_another_version(filled: Store, policy: Policy, keys: Keys, adapters: list[Path]) -> None:
    policy(RELEASE)
    made = sign(filled, "sentiment:latest", keys("release")[0])
    bundle = filled.blobs.read(made.files[SIGNATURE_FILE], 100_000)
    filled.add(adapters[1], "sentiment:latest")
    filled.attach("sentiment:latest", SIGNATURE_TYPE, {SIGNATURE_FILE: (BUNDLE_TYPE, bundle)})
    _refused(filled, "sentiment:latest", "signs other files")
    _admitted(filled, "sentiment@v1")


def test_replayed_from_another_name(filled: Store, policy: Policy, keys: Keys, adapters: list[Path]) -> None:
    """The content counts; names that must not stand in for each other have keys of their own."""
    policy(RELEASE + '[[rules]]\nnames = ["payments"]\nkeys = ["audit.pub"]\n')
    sign(filled, "sentiment:latest", keys("release")[0])
    filled.add(adapters[0], "prod/a:latest")
    filled.add(adapters[0], "payments:latest")
    _admitted(filled, "prod/a:latest")
    _refused(filled, "payments:latest", "signed by another key")


def test_a_tag_may_move_back_to_an_older_signed_version(
    filled: Store, policy: Policy, keys: Keys, adapters: list[Path]
) -> None:
    """As the documentation says: whoever must not get an older version names it by number or digest."""
    policy(RELEASE)
    filled.add(adapters[1], "sentiment:latest")
    for version in ("sentiment@v1", "sentiment@v2"):
        sign(filled, version, keys("release")[0])
    filled.tag("sentiment@v1", "latest")
    _admitted(filled, "sentiment:latest")


def test_the_signature_is_damaged(filled: Store, policy: Policy, keys: Keys) -> None:
    policy(RELEASE)
    made = sign(filled, "sentiment:latest", keys("release")[0])
    path = filled.root / "blobs" / "sha256" / made.files[SIGNATURE_FILE].digest.removeprefix("sha256:")
    before = path.read_bytes()
    flip_bit(path)
    _refused(filled, "sentiment:latest", path.name)
    path.write_bytes(before)
    _admitted(filled, "sentiment:latest")


def test_the_manifest_of_the_signature_is_damaged(filled: Store, policy: Policy, keys: Keys) -> None:
    policy(RELEASE)
    made = sign(filled, "sentiment:latest", keys("release")[0])
    (filled.root / "blobs" / "sha256" / made.descriptor.digest.removeprefix("sha256:")).unlink()
    _refused(filled, "sentiment:latest", made.descriptor.digest.removeprefix("sha256:"))


def test_the_signature_is_gone(filled: Store, policy: Policy, keys: Keys, adapters: list[Path]) -> None:
    policy(RELEASE)
    sign(filled, "sentiment:latest", keys("release")[0])
    _admitted(filled, "sentiment:latest")
    filled.remove("sentiment@v1", force=True)
    filled.add(adapters[0], "sentiment:latest")
    _refused(filled, "sentiment:latest", "carries no signature")


def test_the_policy_is_damaged(filled: Store, policy: Policy, keys: Keys) -> None:
    path = policy(RELEASE)
    sign(filled, "sentiment:latest", keys("release")[0])
    _admitted(filled, "sentiment:latest")
    path.write_text(RELEASE + "x = ")
    _refused(filled, "sentiment:latest", "not readable TOML")
    path.unlink()
    _refused(filled, "sentiment:latest", "No such file")
    path.mkdir()
    _refused(filled, "sentiment:latest", "directory|regular")


def test_what_was_admitted_once_is_remembered_by_digests(
    filled: Store, policy: Policy, keys: Keys, monkeypatch: pytest.MonkeyPatch, adapters: list[Path]
) -> None:
    judged: list[str] = []

    def counting(store: Store, reference: str, *rest: object) -> Verdict:
        judged.append(reference)
        return judge(store, reference, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(admission, "judge", counting)
    policy(RELEASE)
    for _ in range(2):
        with pytest.raises(UntrustedError):
            filled.resolve("sentiment:latest")
    assert len(judged) == 2
    sign(filled, "sentiment:latest", keys("release")[0])
    for _ in range(3):
        filled.resolve("sentiment:latest")
    assert len(judged) == 3
    sign(filled, "sentiment:latest", keys("audit")[0])
    filled.resolve("sentiment:latest")
    assert len(judged) == 4
    policy(RELEASE + "# other words\n")
    filled.resolve("sentiment:latest")
    assert len(judged) == 5
    filled.add(adapters[1], "sentiment:latest")
    with pytest.raises(UntrustedError):
        filled.resolve("sentiment:latest")


def test_what_was_checked_is_what_is_handed_out(
    filled: Store, policy: Policy, keys: Keys, monkeypatch: pytest.MonkeyPatch, adapters: list[Path]
) -> None:
    policy(RELEASE)
    sign(filled, "sentiment:latest", keys("release")[0])
    good = filled.checkout("sentiment:latest", unchecked=True)
    filled.add(adapters[1], "sentiment:evil")
    evil = filled.find("sentiment:evil")

    def tag_moves_meanwhile(store: Store, reference: str, *rest: object) -> Verdict:
        verdict = judge(store, reference, *rest)  # type: ignore[arg-type]
        store.tag(evil.reference, "latest")
        return verdict

    monkeypatch.setattr(admission, "judge", tag_moves_meanwhile)
    for way in (resolve, filled.checkout, filled.resolve):
        filled.tag("sentiment@v1", "latest")
        admission._admitted.clear()
        assert way("sentiment:latest") == good
        assert filled.find("sentiment:latest").digest == evil.digest
    with pytest.raises(UntrustedError):
        filled.resolve("sentiment:latest")


def test_without_the_library_nothing_is_admitted(filled: Store, policy: Policy, keys: Keys) -> None:
    policy(RELEASE)
    sign(filled, "sentiment:latest", keys("release")[0])
    program = """
import sys
if sys.argv[1] == "without":
    sys.modules["model_signing"] = None
from adapters_store.resolve import resolve
print(resolve("sentiment:latest"))
"""
    done = {
        how: subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=False)
        for how in ("with", "without")
    }
    assert done["with"].returncode == 0, done["with"].stderr
    assert done["without"].returncode == 1
    assert "UntrustedError" in done["without"].stderr
    assert "pip install" in done["without"].stderr
