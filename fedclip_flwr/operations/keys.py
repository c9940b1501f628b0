"""The keys of real sites: a certificate authority, the server's certificate, and a key pair for each site.

There is one folder for each machine, to be copied there as a whole. Nothing is ever overwritten, and everything derived
from a key is made from the key on disk: the same command completes an interrupted one.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedclip_flwr.base import UserError, content, files
from fedclip_flwr.operations.certificates import names_of

CA_DAYS, SERVER_DAYS = 3650, 825
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Always among the server's names: its administrator connects there."""
LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
Key = ec.EllipticCurvePrivateKey


def make(folder: Path, server: str = "", sites: Sequence[str] = (), days: int | None = None) -> str:
    """Makes what does not exist yet; returns what is in which folder, and what to do next."""
    names = read_names(server) if server else ()
    for site in sites:
        if content.file_name(site) != site or site.startswith("-") or not site:
            raise UserError(f"--site {site!r}: expected a name of letters, digits, dots, - and _, valid for a file")
    if not names and not sites:
        raise UserError("nothing to make: name the server with --server, or a site with --site")
    if days is not None and not (names and 1 <= days <= CA_DAYS):
        raise UserError(f"--days {days}: expected 1 to {CA_DAYS}, together with --server, for its certificate")
    store = KeyStore(folder)
    if names:
        store.serve(names, SERVER_DAYS if days is None else days)
    for site in dict.fromkeys(sites):
        store.add(site)
    return store.report()


def read_names(text: str) -> tuple[str, ...]:
    """The server's names and addresses for its certificate, from a comma list."""
    return tuple(dict.fromkeys([*(_name(part.strip()) for part in text.split(",")), *LOOPBACK]))


def _name(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        labels = text.lower().split(".")
        if all(LABEL.fullmatch(label) for label in labels) and not labels[-1].isdecimal() and len(text) <= 253:
            return text.lower()
    else:
        if not address.is_unspecified:
            return str(address)
    raise UserError(
        f"--server {text!r}: expected the name or IP address by which sites reach it, without a port, such as "
        "fl.example.org or 10.0.0.5; separate several with commas"
    )


class KeyStore:
    """The folder of all keys, and which files this call has made or found there."""

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser()
        self._made: dict[Path, list[str]] = {}
        self._kept: dict[Path, list[str]] = {}
        self._ca, self._server, self._sites = (self._root / name for name in ("ca", "server", "sites"))

    def serve(self, names: Sequence[str], days: int) -> None:
        """Makes the authority, and a certificate for a server with these names."""
        certificate = self._server / "server.crt"
        if _there(certificate):
            _check_names(certificate, names)  # before anything is made
        if _there(self._ca / "ca.crt") and not _there(self._ca / "ca.key"):
            raise UserError(f"{self._ca / 'ca.key'} is missing, and it signs certificates: bring it back")
        ca_key = self._key(self._ca / "ca.key")
        ca = _certificate(self._ca / "ca.crt", self._put(self._ca / "ca.crt", lambda: _authority(ca_key)))
        if ca.public_key() != ca_key.public_key():
            raise UserError(f"{self._ca / 'ca.crt'} belongs to another key than ca.key beside it: restore it")
        key = self._key(self._server / "server.key")
        made = self._put(certificate, lambda: _served(key, names, ca, ca_key, days))
        _check_server(certificate, made, key, ca)
        self._copy(self._ca / "ca.crt", self._server / "ca.crt")

    def add(self, site: str) -> None:
        """Makes a site's key pair; if the authority is here, also the copies that site and server need."""
        folder = self._sites / site
        key = self._key(folder / "node.key", ssh=True)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        own = self._put(folder / "node.pub", lambda: public + f" {site}\n".encode())
        if own.split()[:2] != public.split():
            raise UserError(f"{folder / 'node.pub'} belongs to another key than node.key beside it: move it away")
        if _there(self._ca / "ca.crt"):
            self._copy(self._ca / "ca.crt", folder / "ca.crt")
            self._copy(folder / "node.pub", self._server / f"{site}.pub")

    def report(self) -> str:
        """The folders, what is in them, and what to do next."""
        goes = {self._ca: "stays here: ca.key signs certificates", self._server: "the server"}
        secrets = {self._ca: "ca.key", self._server: "server.key"}
        rows = [("folder", "goes to", "secret", "made now", "existed, kept")]
        for folder in dict.fromkeys((*self._made, *self._kept)):
            made, kept = (", ".join(done.get(folder, ())) or "–" for done in (self._made, self._kept))
            place = goes.get(folder, f"site {folder.name}")
            rows.append((str(folder), place, secrets.get(folder, "node.key"), made, kept))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, "", *self._next()])

    def _next(self) -> list[str]:
        start = [
            "  fedclip site --root-certificates ca.crt --auth-supernode-private-key node.key --superlink HOST:9092 …"
        ]
        if not _there(self._ca / "ca.crt"):
            return [
                "Next: send node.pub to the server's administrator, who registers it: flwr supernode register node.pub",
                "CONNECTION, and gives you ca.crt. node.key stays on this machine. Then start the site:",
                *start,
            ]
        lines = ["Next: bring each folder to its machine; keep the secret files secret."]
        path = self._server / "server.crt"
        if {self._server} & {*self._made, *self._kept} and _there(path):
            certificate = _certificate(path, _read(path))
            names = ", ".join(names_of(certificate))
            lines += [
                f"The certificate is for {names}, until {_end(certificate)}. Start the server:",
                "  fedclip server --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key "
                "--enable-supernode-auth …",
                "Register each site there: flwr supernode register NAME.pub CONNECTION",
            ]
        return [*lines, "Start a site:", *start]

    def _key(self, path: Path, *, ssh: bool = False) -> Key:
        """The private key in that file, made if missing; `ssh`: in OpenSSH's format, which Flower needs for nodes."""
        form = PrivateFormat.OpenSSH if ssh else PrivateFormat.PKCS8
        data = self._put(
            path,
            lambda: ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, form, NoEncryption()),
            mode=0o600,
        )
        try:
            key = load_ssh_private_key(data, None) if ssh else load_pem_private_key(data, None)
        except (TypeError, ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Key):
            raise UserError(f"{path} is not an ECDSA key without a passphrase: move it away and run again")
        return key

    def _copy(self, origin: Path, to: Path) -> None:
        data = _read(origin)
        if self._put(to, lambda: data) != data:
            raise UserError(f"{to} differs from {origin}: move it away and run again")

    def _put(self, path: Path, make: Callable[[], bytes], mode: int = 0o644) -> bytes:
        """The file's content; makes the file if it does not exist."""
        there = _there(path)
        if not there:
            for folder in (self._root, path.parent.parent, path.parent):
                files.make_folder(folder, "DIR", 0o700)
            files.write_atomic(path, partial(_write, make(), mode), "DIR", os.link)
        (self._kept if there else self._made).setdefault(path.parent, []).append(path.name)
        return _read(path)


def _there(path: Path) -> bool:
    return os.path.exists(path)  # unlike Path.exists, no error if the folder belongs to another user


def _write(data: bytes, mode: int, path: Path) -> None:
    """Creates the file with its mode, so that a secret is never readable by others."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): run this as its owner") from None


def _certificate(path: Path, data: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise UserError(f"{path} is not a certificate: move it away and run again") from None


def _end(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"


def _check_names(path: Path, names: Sequence[str]) -> None:
    found = names_of(_certificate(path, _read(path)))
    if set(found) != set(names):
        raise UserError(
            f"{path} is for {', '.join(found) or 'no names'}, not for {', '.join(names)}: move it away and run "
            "again (the CA stays)"
        )


def _check_server(path: Path, data: bytes, key: Key, ca: x509.Certificate) -> None:
    """Raises unless the certificate is for this key, signed by this authority, and not expired."""
    certificate, why = _certificate(path, data), ""
    if certificate.public_key() != key.public_key():
        why = "belongs to another key than server.key beside it"
    if certificate.not_valid_after_utc < datetime.now(UTC):
        why = f"expired on {_end(certificate)}"
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        why = "was not signed by this CA"
    if why:
        raise UserError(f"{path} {why}: move it away and run again (the CA stays)")


def _authority(key: Key) -> bytes:
    """A self-signed certificate of an authority."""
    mark = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"fedclip CA {mark}")])
    builder = _common(key, name, name, key, CA_DAYS).add_extension(x509.BasicConstraints(True, 0), True)
    return _signed(builder.add_extension(_usage(signs=True), True), key)


def _served(key: Key, names: Sequence[str], ca: x509.Certificate, ca_key: Key, days: int) -> bytes:
    """The server's certificate; it expires no later than the authority's."""
    days_left = (ca.not_valid_after_utc - datetime.now(UTC)).days
    if days_left < 1:
        raise UserError(f"the CA expired on {_end(ca)}: name another folder for new keys, and give them to all sites")
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedclip server")])
    builder = (
        _common(key, subject, ca.subject, ca_key, min(days, days_left))
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(_usage(signs=False), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), False)
    )
    return _signed(builder, ca_key)


def _common(key: Key, subject: x509.Name, issuer: x509.Name, issuer_key: Key, days: int) -> x509.CertificateBuilder:
    """The fields of all certificates. They are valid from yesterday: a site's clock may be behind."""
    now, public = datetime.now(UTC), key.public_key()
    return (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _signed(builder: x509.CertificateBuilder, key: Key) -> bytes:
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)
