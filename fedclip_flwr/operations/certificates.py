"""Checks that certificates and keys (made by `keys.py`) are what TLS and Flower need."""

from __future__ import annotations

import ssl
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from fedclip_flwr.base.errors import FaultError

AGAIN = "make it again with fedclip keys"
OUT_OF_DATE, OTHER_NAME = {9, 10}, {62, 64}
"""OpenSSL's error codes for certificates; all other codes concern the signature."""


def read(path: Path) -> x509.Certificate:
    """The first certificate in the file."""
    try:
        return x509.load_pem_x509_certificate(_bytes(path))
    except ValueError:
        raise FaultError(f"{path} has no certificate in PEM format", "give the file that ends in .crt") from None


def names_of(certificate: x509.Certificate) -> list[str]:
    """The certificate's names and addresses."""
    with suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [str(name.value) for name in names]
    return []


def days_left(certificate: x509.Certificate, whose: str) -> int:
    """The days until it expires; raises if it is expired or not valid yet."""
    now = datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        raise FaultError(f"{whose} is not valid before {begins:%Y-%m-%d %H:%M} UTC", f"check the clock, or {AGAIN}")
    if now > ends:
        raise FaultError(f"{whose} has expired on {ends:%Y-%m-%d}", AGAIN)
    return (ends - now).days


def trusting(ca: Path | None) -> ssl.SSLContext:
    """A client's TLS as in gRPC: Python's default is stricter. Without `ca`, it trusts the system's authorities."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if not ca:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(cadata=_bytes(ca).decode())
    except (ssl.SSLError, UnicodeDecodeError):
        raise FaultError(f"{ca} has no certificate that TLS can use", "get ca.crt again") from None
    return context


def rehearse(ca: Path, certificate: Path, key: Path) -> None:
    """Makes a handshake in memory, as any site does; raises if it fails."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _check_private_key(key)
    try:
        server.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        why = "belongs to another key than" if error.reason == "KEY_VALUES_MISMATCH" else "can't be used with"
        raise FaultError(f"{certificate} {why} {key}", f"use a matching pair, or {AGAIN}") from None
    client, there, back = trusting(ca), ssl.MemoryBIO(), ssl.MemoryBIO()
    client.check_hostname = False
    site = client.wrap_bio(back, there)
    for end in (site, server.wrap_bio(there, back, server_side=True), site):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            raise distrusted(error.verify_code, str(certificate), read(certificate), str(ca)) from None
        except ssl.SSLError as error:
            raise FaultError(f"TLS fails with {certificate} ({error.reason})", AGAIN) from None


def distrusted(code: int, whose: str, shown: x509.Certificate, ca: str, name: str = "") -> FaultError:
    """The reason for a failed handshake, from OpenSSL's error code."""
    if code in OUT_OF_DATE:
        try:
            days_left(shown, whose)
        except FaultError as fault:
            return fault
        return FaultError(f"the authority that signed {whose} has expired, or is not valid yet", AGAIN)
    if code in OTHER_NAME:
        return FaultError(
            f"{whose} is for {', '.join(names_of(shown)) or 'no name'}, not for {name}",
            "reach the server by one of these names, or make a certificate for this name (fedclip keys --server)",
        )
    return FaultError(
        f"{whose} was signed by another authority ({shown.issuer.rfc4514_string()}) than {ca}",
        "get the server's ca.crt from its administrator, in a way that you trust",
    )


def node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A site's key, read as Flower reads it."""
    data, key = _bytes(path), None
    with suppress(ValueError, UnsupportedAlgorithm):
        try:
            key = load_ssh_private_key(data, None)
        except TypeError:
            raise FaultError(
                f"{path} has a passphrase, which Flower can't ask for", f"remove it with ssh-keygen -p -f {path}"
            ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FaultError(f"{path} has no ECDSA key in OpenSSH's format", "make one: fedclip keys DIR --site NAME")
    return key


def check_secret(path: Path) -> bool:
    """Raises if all users of the machine can access the file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FaultError(
            f"{path} can't be read ({error.strerror})", "give its path, and run this as its user"
        ) from None
    if mode & 0o007:
        raise FaultError(f"{path} is open to all users of this machine (mode {mode & 0o777:o})", f"chmod 600 {path}")
    return True


def _check_private_key(path: Path) -> None:
    """Raises if the key can't be used; OpenSSL itself would ask for a passphrase."""
    try:
        load_pem_private_key(_bytes(path), None)
    except TypeError:
        raise FaultError(f"{path} has a passphrase, which Flower can't ask for", "store it without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise FaultError(f"{path} has no private key in PEM format", "give the file server.key") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FaultError(
            f"{path} can't be read ({error.strerror})", "give its path, and run this as its user"
        ) from None
