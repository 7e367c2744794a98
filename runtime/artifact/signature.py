"""Who vouches for an artifact: an Ed25519 signature (RFC 8032) of its manifest, which holds every file's hash."""

from os import PathLike
from pathlib import Path

from runtime.artifact.folder import Folder
from runtime.errors import ArtifactError, SignatureError

SIGNATURE, SIGNATURE_BYTES = "manifest.sig", 64


def check_signature(folder: Folder, manifest: bytes, public_key: str | PathLike[str] | bytes) -> None:
    """Raise `SignatureError` unless the folder's signature of `manifest` is by the holder of `public_key`.

    `public_key`: a PEM file's path, or its bytes.
    """
    # only who asks for a signature pays for the library
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    name = "the public key" if isinstance(public_key, bytes) else str(public_key)
    try:
        pem = public_key if isinstance(public_key, bytes) else Path(public_key).read_bytes()
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{name}: is no public key in PEM form: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{name}: is a {type(key).__name__}; expected an Ed25519 public key")
    path = folder.path / SIGNATURE
    try:
        whole = folder.size(SIGNATURE) == SIGNATURE_BYTES
    except ArtifactError:
        whole = False
    if not whole:
        raise SignatureError(f"{path}: missing or not {SIGNATURE_BYTES} bytes; expected a signature by wm-export sign")
    try:
        key.verify(folder.read(SIGNATURE), manifest)
    except InvalidSignature:
        raise SignatureError(
            f"{path}: is not the signature of this manifest by {name}; get the artifact again, or its maker's key"
        ) from None
