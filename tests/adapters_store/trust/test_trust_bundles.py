"""Sigstore bundles, without a store: what counts as a signature of two files, and what does not."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.limits import MAX_SIGNATURE_BYTES
from adapters_store.trust.bundles import make, signer_of
from adapters_store.trust.keys import PublicKey, parse_public_key
from reft_plugins.errors import StoreError

FILES = {"adapter.json": "sha256:" + "1" * 64, "adapter.safetensors": "sha256:" + "2" * 64}
Keys = Callable[[str], tuple[Path, PublicKey]]


def test_what_one_signed_the_other_accepts(keys: Keys) -> None:
    (private, public), (_, other) = keys("release"), keys("other")
    bundle = make(FILES, "sentiment@v1", private)
    assert signer_of(bundle, FILES, [other, public]) == public
    with pytest.raises(StoreError, match="signed by another key"):
        signer_of(bundle, FILES, [other])
    with pytest.raises(StoreError, match="signed by another key"):
        signer_of(bundle, FILES, [])


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_other_curves(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    path = tmp_path / "key.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = parse_public_key(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "its public key"
    )
    assert signer_of(make(FILES, "x", path), FILES, [public]) == public


@pytest.mark.parametrize(
    "others",
    [
        {**FILES, "adapter.json": "sha256:" + "3" * 64},
        {**FILES, "adapter.safetensors": "sha256:" + "3" * 64},
        {"adapter.json": FILES["adapter.safetensors"], "adapter.safetensors": FILES["adapter.json"]},
        {"manifest.json": FILES["adapter.json"], "adapter.safetensors": FILES["adapter.safetensors"]},
        {"adapter.json": FILES["adapter.json"]},
        {**FILES, "tokenizer.json": "sha256:" + "4" * 64},
        {},
    ],
)
def test_it_covers_exactly_these_files(keys: Keys, others: dict[str, str]) -> None:
    private, public = keys("release")
    with pytest.raises(StoreError, match="signs other files"):
        signer_of(make(FILES, "x", private), others, [public])
    with pytest.raises(StoreError, match="signs other files"):
        signer_of(make(others, "x", private), FILES, [public])


def test_a_claimed_key_has_to_have_signed(keys: Keys) -> None:
    (private, public), (_, other) = keys("release"), keys("other")
    document = json.loads(make(FILES, "x", private))
    document["verificationMaterial"]["publicKey"]["hint"] = other.id
    with pytest.raises(StoreError, match="does not verify"):
        signer_of(json.dumps(document).encode(), FILES, [public, other])
    del document["verificationMaterial"]["publicKey"]["hint"]
    with pytest.raises(StoreError, match="names the public key"):
        signer_of(json.dumps(document).encode(), FILES, [public, other])


def _another_payload(document: dict[str, Any]) -> None:
    payload = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][0]["digest"] = "3" * 64
    document["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another payload": _another_payload,
    "another payload type": lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"),
    "no signatures": lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
    "an empty signature": lambda bundle: bundle["dsseEnvelope"].update(signatures=[{"sig": "", "keyid": ""}]),
    "no envelope": lambda bundle: bundle.pop("dsseEnvelope"),
    "another media type": lambda bundle: bundle.update(mediaType="application/json"),
    "a number for the key": lambda bundle: bundle["verificationMaterial"].update(publicKey=1),
}


@pytest.mark.parametrize("case", EDITS)
def test_edited_bundles(keys: Keys, case: str) -> None:
    private, public = keys("release")
    bundle = json.loads(make(FILES, "x", private))
    assert signer_of(json.dumps(bundle).encode(), FILES, [public]) == public
    EDITS[case](bundle)
    with pytest.raises(StoreError):
        signer_of(json.dumps(bundle).encode(), FILES, [public])


@pytest.mark.parametrize("bundle", [b"", b"{", b"\xff", b"[" * 60_000, b"null", b" " * (MAX_SIGNATURE_BYTES + 1)])
def test_what_is_no_bundle(keys: Keys, bundle: bytes) -> None:
    with pytest.raises(StoreError):
        signer_of(bundle, FILES, [keys("release")[1]])


def test_a_key_named_twice(keys: Keys) -> None:
    private, public = keys("release")
    text = make(FILES, "x", private).decode()
    twice = text.replace('"mediaType":', f'"mediaType":{json.dumps("x")},"mediaType":', 1)
    assert json.loads(twice) == json.loads(text)
    with pytest.raises(StoreError, match="duplicate key"):
        signer_of(twice.encode(), FILES, [public])


def test_mutated_bundles_are_refused_or_say_the_same(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = keys("release")
    bundle = make(FILES, "x", private)
    said = base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"])

    @settings(max_examples=300, deadline=None)
    @given(places=st.lists(st.integers(0, 100_000), min_size=1, max_size=3), cut=st.integers(0, 2), new=st.binary())
    def mutate(places: list[int], cut: int, new: bytes) -> None:
        mutated = bytearray(bundle)
        for place in places:
            mutated[place % len(mutated) : place % len(mutated) + cut] = new
        try:
            assert signer_of(bytes(mutated), FILES, [public]) == public
        except StoreError:
            return
        assert base64.b64decode(json.loads(mutated)["dsseEnvelope"]["payload"]) == said

    mutate()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("password", "message"), [(None, "is encrypted"), ("wrong", "cannot be opened")])
def test_an_encrypted_key_needs_its_password(tmp_path: Path, password: str | None, message: str) -> None:
    from adapters_store.trust.keys import generate, read_public_keys

    private, public = generate(tmp_path / "release.pem", "secret")
    with pytest.raises(StoreError, match=message):
        make(FILES, "x", private, password)
    (key,) = read_public_keys([public])
    assert signer_of(make(FILES, "x", private, "secret"), FILES, [key]) == key
    with pytest.raises(StoreError, match="no private elliptic-curve key"):
        make(FILES, "x", public)


def test_nothing_asks_the_network(tmp_path: Path, keys: Keys) -> None:
    """The library could: the same program with its keyless verifier is refused by the same guard."""
    private, _ = keys("release")
    program = f"""
import sys
asked = []
def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        asked.append((event, arguments))
        raise OSError(f"asked the network: {{event}}")
sys.addaudithook(guard)
from pathlib import Path
from adapters_store.trust.bundles import make, signer_of
from adapters_store.trust.keys import read_public_keys
files = {FILES!r}
public = read_public_keys([{str(private.with_suffix(".pub"))!r}])
signer_of(make(files, "x", Path({str(private)!r})), files, public)
assert not asked, asked
try:
    import model_signing
    model_signing.verifying.Config().use_sigstore_verifier(identity="a", oidc_issuer="b")
except Exception:
    pass
assert asked
"""
    environment = {"HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
