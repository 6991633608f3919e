"""Signatures: who wrote a bundle (SEC-PRED-001). A manifest finds damage; only a signature finds malice.

Signed and verified with model-signing (the OpenSSF's library) and keys of one's own, offline:

    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem

The signature covers every file including manifest.json and lies beside them in model.sig; the `model_signing`
command verifies it as well.
"""

from pathlib import Path
from typing import Any

from prime_jax.errors import CheckpointError, ExportError
from prime_jax.export.optional import need
from prime_jax.manifest import SIGNATURE


def sign(folder: Path, private_key: Path, password: str | None = None) -> None:
    """Write the signature of a complete folder to its model.sig.

    Args:
        folder: A bundle.
        private_key: PEM file of an elliptic-curve key.
        password: Of the key, where it is encrypted.

    Raises:
        ExportError: If model-signing is missing or the key cannot be used.
    """
    signing = need("model_signing", "sign").signing
    if not private_key.is_file():
        raise ExportError(f"{private_key}: there is no such key file")
    # model-signing 1.1 hands the password on as it is, and cryptography takes bytes only
    secret: Any = None if password is None else password.encode()
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
        config.set_hashing_config(_hashing(folder)).sign(folder, folder / SIGNATURE)
    except Exception as failed:  # cryptography raises many kinds for an unfit key
        raise ExportError(f"{private_key}: cannot sign with this key: {failed}") from None


def verify_signature(folder: Path, public_key: Path) -> None:
    """Check that the owner of a key signed a folder as it is.

    Raises:
        CheckpointError: If there is no signature, it is of another key, or a file was changed or added since.
        ExportError: If model-signing is missing or the key cannot be read.
    """
    verifying = need("model_signing", "sign").verifying
    signature = folder / SIGNATURE
    if (compiled := folder / "__pycache__").exists():  # a signature says itself what it leaves out
        raise CheckpointError(
            f"{compiled}: compiled code that nobody signed; delete it, import with python -B"
        )
    if not signature.is_file():
        raise CheckpointError(f"{folder}: is not signed, there is no {SIGNATURE}")
    if not public_key.is_file():
        raise ExportError(f"{public_key}: there is no such key file")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as failed:
        raise ExportError(f"{public_key}: not a public elliptic-curve key: {failed}") from None
    try:
        config.set_hashing_config(_hashing(folder)).verify(folder, signature)
    except Exception as failed:  # one kind for a wrong key, another for a changed file, others for damage
        raise CheckpointError(f"{signature}: the signature does not hold: {failed}") from None


def _hashing(folder: Path) -> Any:
    hashing = need("model_signing", "sign").hashing
    return hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)
