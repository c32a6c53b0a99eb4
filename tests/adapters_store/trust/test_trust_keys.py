from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from adapters_store.trust.keys import generate, parse_public_key, read_public_keys, read_settings
from reft_plugins.errors import StoreError


def _pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_a_pair_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        private, public = generate(tmp_path / "release.pem")
    finally:
        os.umask(old)
    assert (private.name, public.name) == ("release.pem", "release.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    before = private.read_bytes()
    with pytest.raises(StoreError, match="never replaced"):
        generate(tmp_path / "release.pem")
    assert private.read_bytes() == before
    public.rename(tmp_path / "other.pub")
    with pytest.raises(StoreError, match=r"other\.pem|other\.pub"):
        generate(tmp_path / "other.pem")
    assert not (tmp_path / "other.pem").exists()


def test_the_password_encrypts(tmp_path: Path) -> None:
    private, _ = generate(tmp_path / "release.pem", "secret")
    with pytest.raises(TypeError, match="encrypted"):
        load_pem_private_key(private.read_bytes(), None)
    assert load_pem_private_key(private.read_bytes(), b"secret")


def test_equal_keys_have_equal_ids_whatever_their_files_look_like() -> None:
    pem = _pem(ec.generate_private_key(ec.SECP256R1()))
    spaced = b"some words before\n" + pem.replace(b"\n", b"\r\n")
    assert parse_public_key(pem, "a").id == parse_public_key(spaced, "b").id
    assert parse_public_key(pem, "a").id != parse_public_key(_pem(ec.generate_private_key(ec.SECP256R1())), "a").id


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_the_three_curves(curve: ec.EllipticCurve) -> None:
    assert len(parse_public_key(_pem(ec.generate_private_key(curve)), "a").id) == 64


@pytest.mark.parametrize(
    ("pem", "message"),
    [
        (_pem(ec.generate_private_key(ec.SECP256K1())), "of kind secp256k1"),
        (_pem(ec.generate_private_key(ec.SECP224R1())), "of kind secp224r1"),
        (_pem(ed25519.Ed25519PrivateKey.generate()), "of kind Ed25519PublicKey"),
        (_pem(rsa.generate_private_key(65537, 2048)), "of kind RSAPublicKey"),
        (b"", "no public key"),
        (b"\xff\x00", "no public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key"),
        (b"-----BEGIN PRIVATE KEY-----\n", "is a private key"),
    ],
)
def test_other_keys_are_refused(pem: bytes, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        parse_public_key(pem, "a key")


def test_files_that_decide_about_trust(tmp_path: Path) -> None:
    path = tmp_path / "key.pub"
    path.write_bytes(_pem(ec.generate_private_key(ec.SECP256R1())))
    link = tmp_path / "link.pub"
    link.symlink_to(path)
    assert read_public_keys([link])[0].id == read_public_keys([path])[0].id
    path.chmod(0o646)
    with pytest.raises(StoreError, match="everybody on this machine may write"):
        read_public_keys([link])
    path.chmod(0o644)
    with pytest.raises(StoreError, match="limit of 10 bytes"):
        read_settings(path, 10)
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("missing", "No such file"), (".", "directory|regular"), ("fifo", "regular")):
        with pytest.raises(StoreError, match=message):
            read_settings(tmp_path / name, 10)
