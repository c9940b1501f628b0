"""Whether files of certificates and keys are what TLS and Flower need, told in words (`keys.py` makes them)."""

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

AGAIN = "have it made again with fedclip keys"
OUT_OF_DATE, OTHER_NAME = {9, 10}, {62, 64}
"""OpenSSL's numbers for what can be wrong with a certificate; the others are all about who has signed it."""


def read(path: Path) -> x509.Certificate:
    """The first certificate in the file."""
    try:
        return x509.load_pem_x509_certificate(_bytes(path))
    except ValueError:
        raise FaultError(f"{path} holds no certificate in PEM form", "give the file that ends in .crt") from None


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that the certificate is for."""
    with suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [str(name.value) for name in names]
    return []


def days_left(certificate: x509.Certificate, whose: str) -> int:
    """How long it is still good; raises if it is not, or not yet."""
    now = datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        raise FaultError(f"{whose} is good only from {begins:%Y-%m-%d %H:%M} UTC", f"check this clock, or {AGAIN}")
    if now > ends:
        raise FaultError(f"{whose} has expired on {ends:%Y-%m-%d}", AGAIN)
    return (ends - now).days


def trusting(ca: Path | None) -> ssl.SSLContext:
    """A client's TLS as gRPC has it: Python's own default would be stricter. Without `ca`, the system's authorities."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if not ca:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(cadata=_bytes(ca).decode())
    except (ssl.SSLError, UnicodeDecodeError):
        raise FaultError(f"{ca} holds no certificate that TLS can use", "get ca.crt once more") from None
    return context


def rehearse(ca: Path, certificate: Path, key: Path) -> None:
    """A handshake in memory, as any site will make it: raises if it fails."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _check_private_key(key)
    try:
        server.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        why = "is of another key than" if error.reason == "KEY_VALUES_MISMATCH" else "can't be used with"
        raise FaultError(f"{certificate} {why} {key}", f"bring the two that belong together, or {AGAIN}") from None
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
    """Why a handshake has failed with that code of OpenSSL's."""
    if code in OUT_OF_DATE:
        try:
            days_left(shown, whose)
        except FaultError as fault:
            return fault
        return FaultError(f"the authority that has signed {whose} has expired, or is not good yet", AGAIN)
    if code in OTHER_NAME:
        return FaultError(
            f"{whose} is for {', '.join(names_of(shown)) or 'no name at all'}, and not for {name}",
            "reach the server by one of these names, or have the certificate made for this one (fedclip keys --server)",
        )
    return FaultError(
        f"{whose} was signed by another authority ({shown.issuer.rfc4514_string()}) than {ca}",
        "get the ca.crt that belongs to the server from its administrator, in a way that you trust",
    )


def node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A site's key, as Flower reads it."""
    data, key = _bytes(path), None
    with suppress(ValueError, UnsupportedAlgorithm):
        try:
            key = load_ssh_private_key(data, None)
        except TypeError:
            raise FaultError(
                f"{path} has a passphrase, which Flower can't ask for", f"take it off with ssh-keygen -p -f {path}"
            ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FaultError(f"{path} holds no ECDSA key as OpenSSH writes it", "make one: fedclip keys DIR --site NAME")
    return key


def check_secret(path: Path) -> bool:
    """Raises if anybody on the machine could read the file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FaultError(
            f"{path} can't be read ({error.strerror})", "give its path, and run this as its user"
        ) from None
    if mode & 0o007:
        raise FaultError(f"{path} is open to everybody on this machine (mode {mode & 0o777:o})", f"chmod 600 {path}")
    return True


def _check_private_key(path: Path) -> None:
    """OpenSSL would ask for a passphrase."""
    try:
        load_pem_private_key(_bytes(path), None)
    except TypeError:
        raise FaultError(f"{path} has a passphrase, which Flower can't ask for", "store it without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise FaultError(f"{path} holds no private key in PEM form", "give the file server.key") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FaultError(
            f"{path} can't be read ({error.strerror})", "give its path, and run this as its user"
        ) from None
