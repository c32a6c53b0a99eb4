"""Keys of people and machines that sign adapters: elliptic-curve keys in PEM files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.limits import MAX_KEY_BYTES
from reft_plugins.errors import StoreError

CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
"""What sigstore bundles are signed with, by the name in a key and by the usual one."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signatures are checked with.

    Attributes:
        id: SHA-256 of `pem` in hexadecimal, which is also what a sigstore bundle says of the key that signed it.
        pem: SubjectPublicKeyInfo in PEM, as the library writes it; equal keys have equal texts.
        label: how messages call it: its file's path, or where it was written down.
    """

    id: str
    pem: str
    label: str

    def __str__(self) -> str:
        return f"{self.label} ({self.id[:12]})"


def distinct(keys: Iterable[PublicKey]) -> tuple[PublicKey, ...]:
    """Each key once, as it is first called."""
    found: dict[str, PublicKey] = {}
    for key in keys:
        found.setdefault(key.id, key)
    return tuple(found.values())


def parse_public_key(pem: bytes, label: str) -> PublicKey:
    """Read a public key.

    Raises:
        StoreError: when it is none, or of a kind that sigstore bundles are not signed with.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    if b"PRIVATE KEY-----" in pem:
        raise StoreError(f"{label}: is a private key. Give the public one, and keep this one to yourself")
    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise StoreError(
            f"{label}: no public key in PEM. `reft store keygen` makes a pair, as does `openssl ecparam -genkey`"
        ) from None
    curve = key.curve.name if isinstance(key, EllipticCurvePublicKey) else None
    if curve not in CURVES:
        raise StoreError(
            f"{label}: is a key of kind {curve or type(key).__name__.removeprefix('_')}. Signatures are made with "
            f"elliptic-curve keys on {', '.join(CURVES.values())}; make one with `reft store keygen`"
        )
    text = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(hashlib.sha256(text).hexdigest(), text.decode("ascii"), label)


def read_public_keys(paths: Iterable[Path | str]) -> tuple[PublicKey, ...]:
    """The public keys in some files.

    Raises:
        StoreError: naming the file that cannot be read or holds none.
    """
    return tuple(parse_public_key(read_settings(Path(path), MAX_KEY_BYTES), str(path)) for path in paths)


def read_settings(path: Path, limit: int) -> bytes:
    """The bytes of a file that decides what is trusted.

    Symbolic links are followed, because cluster software mounts such files as links; what they lead to has to be a
    regular file that not everybody may write.

    Raises:
        StoreError: when it cannot be read, is no such file, or has more than `limit` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise StoreError(f"{path}: is not a regular file")
            if mode & stat.S_IWOTH:
                raise StoreError(f"{path}: everybody on this machine may write it. Take that away with `chmod o-w`")
            data = file.read(limit + 1)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise StoreError(f"{path}: larger than the limit of {limit} bytes")
    return data


def generate(path: Path, password: str | None = None) -> tuple[Path, Path]:
    """Make a key pair on P-256.

    Args:
        path: of the private key, readable by its owner alone; the public key is put beside it, with the suffix `.pub`.
        password: encrypts the private key.

    Returns:
        The two paths, private key first.

    Raises:
        StoreError: when one of the files exists or cannot be written; nothing is left behind then.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = ec.generate_private_key(ec.SECP256R1())
    encryption: KeySerializationEncryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    beside = path.with_name(f"{path.stem}.pub")
    made = []
    try:
        for target, data, mode in ((path, private, 0o600), (beside, public, 0o644)):
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
                made.append(target)
                file.write(data)
    except OSError as error:
        for target in made:
            target.unlink()
        where = error.filename or path
        if isinstance(error, FileExistsError):
            raise StoreError(f"{where}: is there already, and a key is never replaced. Choose another name") from None
        raise StoreError(f"{where}: cannot make the key: {error.strerror}") from None
    return path, beside
