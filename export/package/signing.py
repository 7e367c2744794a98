"""Sign an artifact's manifest, which holds every other file's hash."""

import logging
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from export.errors import ExportError
from export.package.directory import revising, write_file
from runtime.artifact.integrity import read_artifact
from runtime.artifact.signature import SIGNATURE

log = logging.getLogger(__name__)


def sign(directory: str | Path, key: str | Path) -> Path:
    """Sign an artifact with the Ed25519 private key in the PEM file `key`; returns the path of the signature.

    Only an artifact that loads is signed: whole, and verified. Raises `runtime.ArtifactError`, `ExportError`, OSError.
    """
    directory = Path(directory)
    artifact = read_artifact(directory)
    try:
        private = load_pem_private_key(Path(key).read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ExportError(f"{key}: is no unencrypted private key in PEM form: {error}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ExportError(f"{key}: is a {type(private).__name__}; expected an Ed25519 private key")
    with revising(artifact) as new:
        write_file(new / SIGNATURE, private.sign(artifact.manifest))
    log.info("signed %s", directory)
    return directory / SIGNATURE
