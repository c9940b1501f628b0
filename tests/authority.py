"""Certificates with any faults, and servers that show them."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedclip_flwr.flower import lines
from fedclip_flwr.flower.connections import VERSION
from fedclip_flwr.operations.doctor.endpoints import Address


@dataclass(frozen=True)
class Files:
    """What a SuperLink is started with."""

    ca: Path
    certificate: Path
    key: Path


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def certify(folder: Path, names: Sequence[str] = ("localhost",), begins: int = -1, ends: int = 100) -> Files:
    """An authority of its own, and a certificate for these names; days count from now."""
    folder.mkdir()
    now, ca_key, key = datetime.now(UTC), *(ec.generate_private_key(ec.SECP384R1()) for _ in range(2))

    def begun(subject: str, of: ec.EllipticCurvePrivateKey, begins: int, ends: int) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(_name("an authority"), _name(subject), of.public_key(), x509.random_serial_number())
            .not_valid_before(now + timedelta(days=begins))
            .not_valid_after(now + timedelta(days=ends))
        )

    ca = begun("an authority", ca_key, -1000, 1000).add_extension(x509.BasicConstraints(True, 0), True)
    server = begun("a server", key, begins, ends)
    if names:
        server = server.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
    files = Files(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    for path, builder in ((files.ca, ca), (files.certificate, server)):
        path.write_bytes(builder.sign(ca_key, hashes.SHA384()).public_bytes(Encoding.PEM))
    files.key.touch(0o600)
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


@contextmanager
def serving(files: Files | None, transport: str = "", version: str = "") -> Iterator[Address]:
    """A server of that transport, or of this Flower's, without any service; with TLS if it has the files for it."""
    if (transport or lines.line().transport) == lines.GRPC.transport:
        with _serving_grpc(files) as address:
            yield address
    else:
        with _serving_http(files, version) as address:
            yield address


@contextmanager
def _serving_grpc(files: Files | None) -> Iterator[Address]:
    server = grpc.server(ThreadPoolExecutor(1))
    if files:
        pair = files.key.read_bytes(), files.certificate.read_bytes()
        port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
    else:
        port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        yield Address("localhost", port)
    finally:
        server.stop(None).wait()


@contextmanager
def _serving_http(files: Files | None, version: str) -> Iterator[Address]:
    class Up(BaseHTTPRequestHandler):
        """A SuperLink that is up, and tells its version of Flower if it has one."""

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            if version:
                self.send_header(VERSION, version)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), Up)
    if files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Address("localhost", server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
