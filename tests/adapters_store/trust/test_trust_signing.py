"""Signatures attached to versions of a store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_variants import flip_bit, vary

from adapters_store import Store
from adapters_store.layout.oci import SIGNATURE_TYPE
from adapters_store.remotes.transfer import push
from adapters_store.trust import signing
from adapters_store.trust.bundles import BUNDLE_TYPE, make
from adapters_store.trust.keys import PublicKey
from adapters_store.trust.signing import SIGNATURE_FILE, sign, sound_files, verify
from reft_plugins.errors import StoreError, UnknownReferenceError

Keys = Callable[[str], tuple[Path, PublicKey]]


@pytest.fixture
def filled(store: Store, adapters: list[Path]) -> Store:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:next")
    store.add(adapters[0], "other:latest")
    return store


def _bundle(store: Store, reference: str) -> bytes:
    (signature,) = store.attachments(reference, SIGNATURE_TYPE)
    return store.blobs.read(signature.files[SIGNATURE_FILE], 100_000)


def _blob(store: Store, digest: str) -> Path:
    return store.root / "blobs" / "sha256" / digest.removeprefix("sha256:")


def test_who_signed(filled: Store, keys: Keys) -> None:
    (release_key, release), (audit_key, audit), (_, stranger) = keys("release"), keys("audit"), keys("stranger")
    verdict = verify(filled, "sentiment:latest", [release])
    assert (verdict.ok, verdict.signatures, verdict.explain()) == (False, (), "carries no signature")
    made = sign(filled, "sentiment:latest", release_key)
    assert made.subject == filled.find("sentiment:latest").digest
    assert verify(filled, "sentiment@v1", [stranger, release]).signers == (release,)
    sign(filled, "sentiment@v1", audit_key)
    sign(filled, "sentiment@v1", audit_key)
    verdict = verify(filled, "sentiment:latest", [audit, release])
    assert verdict.signers == (release, audit)
    assert len(verdict.signatures) == 3
    verdict = verify(filled, "sentiment:latest", [stranger])
    assert (verdict.ok, verdict.signers) == (False, ())
    assert verdict.explain().count("signed by another key") == 3
    assert not verify(filled, "sentiment:next", [release, audit]).ok
    assert filled.verify().ok
    with pytest.raises(UnknownReferenceError):
        sign(filled, "sentiment:nope", release_key)


def test_the_librarys_own_command_reads_it(filled: Store, keys: Keys, tmp_path: Path) -> None:
    private, _ = keys("release")
    sign(filled, "sentiment:latest", private)
    (tmp_path / "signature.json").write_bytes(_bundle(filled, "sentiment:latest"))

    def verified(folder: Path, key: str = "release.pub") -> bool:
        command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
        options = ["--signature", str(tmp_path / "signature.json"), "--public_key", str(tmp_path / key)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
        assert ("Verification succeeded" in done.stdout) == (done.returncode == 0), done.stderr
        return done.returncode == 0

    folder = filled.checkout("sentiment:latest")
    keys("stranger")
    assert verified(folder)
    assert not verified(folder, "stranger.pub")
    assert not verified(filled.checkout("sentiment:next"))
    (folder / "adapter.json").chmod(0o644)
    (folder / "adapter.json").write_text("{}")
    assert not verified(folder)


def test_the_librarys_own_command_signs_for_us(filled: Store, keys: Keys, tmp_path: Path) -> None:
    private, public = keys("release")
    signature = tmp_path / "signature.json"
    folder = filled.checkout("sentiment:latest")
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(folder)]
    options = ["--signature", str(signature), "--private_key", str(private)]
    subprocess.run([*command, *options], capture_output=True, timeout=60, check=True)
    filled.attach("sentiment:latest", SIGNATURE_TYPE, {SIGNATURE_FILE: (BUNDLE_TYPE, signature.read_bytes())})
    assert verify(filled, "sentiment:latest", [public]).signers == (public,)


def test_a_signature_of_another_version_is_worth_nothing(filled: Store, keys: Keys) -> None:
    private, public = keys("release")
    sign(filled, "sentiment:latest", private)
    filled.attach("sentiment:next", SIGNATURE_TYPE, {SIGNATURE_FILE: (BUNDLE_TYPE, _bundle(filled, "sentiment@v1"))})
    verdict = verify(filled, "sentiment:next", [public])
    assert not verdict.ok
    assert "signs other files" in verdict.explain()


def test_another_manifest_with_the_same_tensors_is_another_content(
    filled: Store, adapters: list[Path], keys: Keys, tmp_path: Path
) -> None:
    private, public = keys("release")
    sign(filled, "sentiment@v1", private)
    filled.add(vary(adapters[0], tmp_path / "varied", "other words"), "sentiment:varied")
    filled.attach("sentiment:varied", SIGNATURE_TYPE, {SIGNATURE_FILE: (BUNDLE_TYPE, _bundle(filled, "sentiment@v1"))})
    assert not verify(filled, "sentiment:varied", [public]).ok


def test_the_same_content_under_another_name_is_signed_too(filled: Store, keys: Keys) -> None:
    """A signature binds content, as the documentation says; this is what rules per name are for."""
    private, public = keys("release")
    sign(filled, "sentiment@v1", private)
    assert verify(filled, "other:latest", [public]).ok


@pytest.mark.parametrize("which", [0, 1])
def test_damaged_content_is_neither_signed_nor_verified(filled: Store, keys: Keys, which: int) -> None:
    private, public = keys("release")
    sign(filled, "sentiment@v1", private)
    flip_bit(_blob(filled, list(sound_files(filled, "sentiment@v1").values())[which]))
    with pytest.raises(StoreError, match="damaged|digest"):
        verify(filled, "sentiment@v1", [public])
    with pytest.raises(StoreError, match="damaged|digest"):
        sign(filled, "sentiment@v1", private)


def test_a_changed_checkout_does_not_matter(filled: Store, keys: Keys) -> None:
    private, public = keys("release")
    folder = filled.checkout("sentiment@v1")
    for name in ("adapter.json", "adapter.safetensors"):
        (folder / name).chmod(0o644)
        (folder / name).write_bytes(b"something else")
    sign(filled, "sentiment@v1", private)
    assert verify(filled, "sentiment@v1", [public]).ok


def test_a_damaged_signature_does_not_count_and_a_sound_one_beside_it_does(filled: Store, keys: Keys) -> None:
    private, public = keys("release")
    made = sign(filled, "sentiment@v1", private)
    flip_bit(_blob(filled, made.files[SIGNATURE_FILE].digest))
    verdict = verify(filled, "sentiment@v1", [public])
    assert not verdict.ok
    assert made.descriptor.digest[:19] in verdict.explain()
    for files in ({"other.json": (BUNDLE_TYPE, b"{}")}, {SIGNATURE_FILE: (BUNDLE_TYPE, b" " * 100_000)}):
        filled.attach("sentiment@v1", SIGNATURE_TYPE, files)
    verdict = verify(filled, "sentiment@v1", [public])
    assert not verdict.ok
    assert f"holds no {SIGNATURE_FILE}" in verdict.explain()
    assert "limit" in verdict.explain()
    sign(filled, "sentiment@v1", private)
    assert verify(filled, "sentiment@v1", [public]).signers == (public,)


def test_more_signatures_than_anybody_needs(filled: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever attaches many of them takes nothing away from those that were there before."""
    monkeypatch.setattr(signing, "MAX_SIGNATURES", 5)
    (private, public), (other, _) = keys("release"), keys("other")

    def flood(reference: str) -> None:
        for number in range(8):
            bundle = make(sound_files(filled, reference), str(number), other)
            filled.attach(reference, SIGNATURE_TYPE, {SIGNATURE_FILE: (BUNDLE_TYPE, bundle)})

    sign(filled, "sentiment@v1", private)
    flood("sentiment@v1")
    verdict = verify(filled, "sentiment@v1", [public])
    assert (verdict.signers, len(verdict.signatures), verdict.ignored) == ((public,), 5, 4)
    flood("sentiment@v2")
    with pytest.raises(StoreError, match="nobody looks at one more"):
        sign(filled, "sentiment@v2", private)
    assert "3 more than 5 were not looked at" in verify(filled, "sentiment@v2", [public]).explain()


def test_signatures_travel(filled: Store, keys: Keys, tmp_path: Path) -> None:
    private, public = keys("release")
    sign(filled, "sentiment@v1", private)
    elsewhere = Store.init(tmp_path / "elsewhere")
    push(filled, "sentiment", elsewhere)
    assert verify(elsewhere, "sentiment@v1", [public]).signers == (public,)
    assert not verify(elsewhere, "sentiment@v2", [public]).ok
