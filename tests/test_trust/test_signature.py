"""Only what the key's holder signed is loaded, and nothing that was changed since."""

import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from export import ExportError, sign, verify
from runtime import ArtifactError, SignatureError, load
from test_trust.samples import rewrite


def write_keys(directory, name, private=None, encryption=None):
    private = private or ed25519.Ed25519PrivateKey.generate()
    encryption = encryption or NoEncryption()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    (directory / f"{name}.pem").write_bytes(pem)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (directory / f"{name}.pub.pem").write_bytes(public)
    return directory / f"{name}.pem", directory / f"{name}.pub.pem"


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path, "key")


def test_signed_by_the_right_key(copy, keys, tmp_path):
    private, public = keys
    with pytest.raises(SignatureError, match=r"manifest\.sig: missing"):
        load(copy, public_key=public)
    sign(copy, private)
    for key in (public, str(public), public.read_bytes()):
        load(copy, public_key=key)
    load(copy)
    other = write_keys(tmp_path, "other")[1]
    with pytest.raises(SignatureError, match="not the signature"):
        load(copy, public_key=other)


def test_a_change_after_signing_is_found(copy, keys):
    private, public = keys
    sign(copy, private)
    rewrite(copy, lambda manifest: manifest["model"].update(parameters=1))
    load(copy)
    with pytest.raises(SignatureError, match="not the signature"):
        load(copy, public_key=public)


def test_signed_weights_are_hashed_before_they_are_loaded(copy, keys, monkeypatch):
    private, public = keys
    sign(copy, private)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[0] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    loaded = []
    monkeypatch.setattr("runtime.backends.ort_cpu.OnnxSession", lambda *arguments: loaded.append(arguments))
    for key, sessions in ((public, 0), (None, 1)):
        with pytest.raises(ArtifactError, match=r"model\.onnx\.data: SHA-256"):
            load(copy, public_key=key)
        assert len(loaded) == sessions


def test_the_signature_is_checked_before_the_manifest_is_parsed(copy, keys):
    private, public = keys
    sign(copy, private)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(SignatureError):
        load(copy, public_key=public)


def test_verifying_again_keeps_a_signature_that_stands(copy, keys, artifact):
    private, public = keys
    sign(copy, private)
    assert all(verdict.passed for verdict in verify(copy))
    load(copy, public_key=public)


def test_only_what_loads_is_signed(copy, keys):
    rewrite(copy, lambda manifest: manifest.update(verified=False))
    with pytest.raises(ArtifactError, match="verification"):
        sign(copy, keys[0])


def test_keys_that_are_none(copy, tmp_path, keys):
    (tmp_path / "text").write_text("no key")
    elliptic = write_keys(tmp_path, "elliptic", ec.generate_private_key(ec.SECP256R1()))
    locked = write_keys(tmp_path, "locked", encryption=BestAvailableEncryption(b"word"))
    for key, words in ((tmp_path / "text", "PEM"), (elliptic[0], "Ed25519"), (locked[0], "unencrypted")):
        with pytest.raises(ExportError, match=words):
            sign(copy, key)
    sign(copy, keys[0])
    for key, words in ((tmp_path / "text", "PEM"), (elliptic[1], "Ed25519"), (keys[0], "PEM")):
        with pytest.raises(SignatureError, match=words):
            load(copy, public_key=key)
    with pytest.raises(FileNotFoundError):
        load(copy, public_key=tmp_path / "none")


def test_the_library_is_imported_only_for_signatures(artifact):
    code = "import sys; from runtime import load; load(sys.argv[1]); print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code, artifact], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
