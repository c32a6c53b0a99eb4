"""Signatures of an adapter's files as sigstore bundles, made and checked offline by the library `model-signing`.

A signature says: a key vouches for files of these names with these SHA-256 digests. The library gets the digests that
the store has verified, and never a folder, so nothing can change between a check of the content and one of the
signature. Its other programs read the same bundles: `model_signing verify key FOLDER --signature … --public_key …`.

Source: OpenSSF model signing specification 1.0 (in-toto statement in a DSSE envelope in a sigstore bundle 0.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from adapters_store.limits import MAX_KEY_BYTES, MAX_SIGNATURE_BYTES
from adapters_store.trust.keys import PublicKey, read_settings
from reft_plugins import strict_json
from reft_plugins.errors import StoreError

try:
    from model_signing import hashing, signing, verifying
    from model_signing._hashing.hashing import Digest
    from model_signing.hashing import PathLike
    from model_signing.manifest import FileManifestItem, Manifest, SerializationType
except ImportError as missing:
    raise StoreError(
        f"signatures need libraries that are not installed ({missing}). "
        "Install them with `pip install 'reft-plugins[store]'`"
    ) from None

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}


class _Known(hashing.Config):
    """Digests that are known already take the place of hashing a folder."""

    def __init__(self, files: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files = files

    def hash(self, model_path: PathLike, *, files_to_hash: Iterable[PathLike] | None = None) -> Manifest:
        """The manifest of exactly these files."""
        items = [
            FileManifestItem(
                path=PurePosixPath(name), digest=Digest("sha256", bytes.fromhex(digest.removeprefix("sha256:")))
            )
            for name, digest in self._files.items()
        ]
        return Manifest(str(model_path), items, SerializationType.from_args(_SERIALIZATION))


def make(files: Mapping[str, str], subject: str, private_key: Path, password: str | None = None) -> bytes:
    """Sign files.

    Args:
        files: digest `sha256:…` by name.
        subject: what the bundle calls them; information for people, which verification leaves aside.
        private_key: PEM file of an elliptic-curve key.

    Returns:
        The bundle, as JSON.

    Raises:
        StoreError: when the key cannot be read or used.
    """
    read_settings(private_key, MAX_KEY_BYTES)
    with _scratch() as folder:
        try:
            config: Any = signing.Config  # which wants bytes for a password, whatever its annotation says
            signer = config().use_elliptic_key_signer(
                private_key=private_key, password=password.encode() if password else None
            )
        except Exception as error:
            raise StoreError(f"{private_key}: {_key_problem(error, password)}") from None
        bundle = folder / "signature.json"
        signer.set_hashing_config(_Known(files)).sign(subject, bundle)
        return bundle.read_bytes()


def signer_of(bundle: bytes, files: Mapping[str, str], keys: Iterable[PublicKey]) -> PublicKey:
    """The key that signed exactly these files.

    Args:
        bundle: a sigstore bundle, believed in nothing.
        files: digest `sha256:…` by name.
        keys: that count.

    Raises:
        StoreError: saying why the bundle is no such signature.
    """
    key = _claimed(bundle, keys)
    with _scratch() as folder:
        pem, signature = folder / "key.pub", folder / "signature.json"
        pem.write_text(key.pem)
        signature.write_bytes(bundle)
        try:
            config: Any = verifying.Config
            verifier = config().use_elliptic_key_verifier(public_key=pem)
            verifier.set_hashing_config(_Known(files)).verify(Path("adapter"), signature)
        except Exception as error:  # the library takes hostile bundles apart without checking their form first
            raise StoreError(f"not a signature of this content by {key}: {_reason(error)}") from None
    return key


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that only this user reads, for what the library takes from files alone."""
    try:
        with TemporaryDirectory(prefix="reft-") as folder:
            yield Path(folder)
    except OSError as error:
        raise StoreError(f"no room for temporary files in {gettempdir()}: {error.strerror}. Set TMPDIR") from None


def _claimed(bundle: bytes, keys: Iterable[PublicKey]) -> PublicKey:
    """The key that a bundle names; without one the library would accept it, and say so on standard output."""
    if len(bundle) > MAX_SIGNATURE_BYTES:
        raise StoreError(f"a bundle of {len(bundle)} bytes exceeds the limit of {MAX_SIGNATURE_BYTES}")
    try:
        document: Any = strict_json.loads(bundle)
        hint = document["verificationMaterial"]["publicKey"]["hint"]
    except ValueError as error:
        raise StoreError(f"damaged: not a sigstore bundle: {error}") from None
    except (KeyError, TypeError):
        raise StoreError("not a sigstore bundle that names the public key it was signed with") from None
    for key in keys:
        if key.id == hint:
            return key
    raise StoreError(f"signed by another key ({str(hint)[:12]!r})")


def _reason(error: Exception) -> str:
    if type(error).__name__ == "InvalidSignature":
        return "the signature does not verify"
    if str(error).startswith("Signature mismatch"):
        return "it signs other files"
    return (str(error) or type(error).__name__).splitlines()[0]


def _key_problem(error: Exception, password: str | None) -> str:
    if not password and "encrypted" in str(error):
        return "is encrypted. Give its password with --password, or in REFT_KEY_PASSWORD"
    if "not encrypted" in str(error):
        return "is not encrypted, so it has no password. Leave the password out"
    if password and isinstance(error, TypeError | ValueError):
        return "cannot be opened with this password"
    return f"no private elliptic-curve key in PEM: {_reason(error)}. `reft store keygen` makes one"
