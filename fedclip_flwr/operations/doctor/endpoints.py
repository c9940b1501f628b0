"""Probes of other machines: ports, TLS, and the nodes that a SuperLink knows. Nothing is changed there."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from click import ClickException
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedclip_flwr.base import UserError
from fedclip_flwr.base.errors import FaultError
from fedclip_flwr.flower import connections, lines
from fedclip_flwr.operations import certificates

PATIENCE = 5.0
"""Seconds until a probe gives up."""
FIRST_WORDS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How an HTTP/2 client begins; the last nine bytes are a SETTINGS frame, which the answer must be, too."""


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Greeting(NamedTuple):
    """The server's side of a connection: TLS, certificate, transport, and the version of Flower if it tells it."""

    tls: str
    certificate: x509.Certificate
    transport: str
    flower: str = ""


def read_address(text: str, option: str) -> Address:
    parsed = connections.parse_address(text)
    if not parsed or not parsed[0] or not parsed[1]:
        raise UserError(f"{option} {text!r}: expected HOST:PORT, such as fl.example.org:9092")
    return Address(*parsed[:2])


def connect(address: Address) -> socket.socket:
    """A connection; raises with the reason if there is none."""
    try:
        return socket.create_connection(address, PATIENCE)
    except (socket.gaierror, UnicodeError):
        found = f"the name {address.host} can't be resolved"
        remedy = "check its spelling; else ask the network's administrator, or add it to /etc/hosts"
    except TimeoutError:
        found = f"{address} does not answer within {PATIENCE:g} s"
        remedy = f"check the address, and let the firewalls in between allow TCP port {address.port}"
    except ConnectionRefusedError:
        found = f"{address} refuses connections: nothing is listening there"
        remedy = "start the SuperLink, or check host and port (a firewall can also refuse)"
    except OSError as error:
        found = f"{address} can't be reached ({error.strerror or error})"
        remedy = "check the address and this machine's network"
    raise FaultError(found, remedy)


def listens(address: Address) -> bool:
    """True if anything accepts connections there."""
    try:
        connect(address).close()
    except FaultError:
        return False
    return True


def greet(address: Address, ca: Path | None, name: str | None) -> Greeting:
    """The server's greeting; raises unless TLS works, with a certificate signed by `ca`, and for `name` if given."""
    context = certificates.trusting(ca)
    context.check_hostname = name is not None
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with connect(address) as plain, context.wrap_socket(plain, server_hostname=name) as secure:
            shown, tls, protocol = _shown(secure), secure.version() or "TLS", secure.selected_alpn_protocol()
            answer = None if protocol == "h2" else _health(secure)
    except ssl.SSLCertVerificationError as error:
        whose, by = f"the certificate of {address}", str(ca or "those that this machine trusts")
        raise certificates.distrusted(error.verify_code, whose, _look(address), by, name or "") from None
    except TimeoutError:
        raise _silent(address) from None
    except OSError as error:
        if speaks_plainly(address):
            raise FaultError(
                f"{address} does not use TLS", "start the SuperLink with its certificates, not with --insecure"
            ) from None
        raise FaultError(
            f"TLS fails with {address} ({getattr(error, 'reason', None) or error.strerror or error})",
            "check host and port: this does not seem to be a SuperLink",
        ) from None
    if answer:
        return Greeting(tls, shown, lines.HTTP.transport, answer.getheader(connections.VERSION, ""))
    if protocol != "h2":
        raise FaultError(
            f"{address} supports TLS, but answers neither like gRPC (HTTP/2 by ALPN) nor like Flower over HTTP",
            "check host and port; a proxy in between must pass TLS through, or support HTTP/2",
        )
    return Greeting(tls, shown, lines.GRPC.transport)


def _look(address: Address) -> x509.Certificate:
    """The server's certificate, without checking who signed it."""
    context = certificates.trusting(None)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with connect(address) as plain, context.wrap_socket(plain) as secure:
        return _shown(secure)


def _shown(secure: ssl.SSLSocket) -> x509.Certificate:
    return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")


def _silent(address: Address) -> FaultError:
    return FaultError(
        f"{address} accepts connections, but sends nothing within {PATIENCE:g} s",
        "check host and port; is a proxy or a firewall in between?",
    )


def speaks_plainly(address: Address) -> str:
    """The transport of a SuperLink that answers there without TLS; empty if none does."""
    try:
        with connect(address) as connection:
            connection.sendall(FIRST_WORDS)
            answer = connection.recv(9)
        if len(answer) == 9 and answer[3] == 4:
            return lines.GRPC.transport
        with connect(address) as connection:
            return lines.HTTP.transport if answer and _health(connection) else ""
    except OSError:
        return ""


def _health(connection: socket.socket) -> http.client.HTTPResponse | None:
    """The answer of a SuperLink over HTTP that is up; None if it is anything else."""
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    try:
        answer.begin()
    except http.client.HTTPException:
        return None
    return answer if answer.status == http.client.OK else None


def version(address: Address, key: ec.EllipticCurvePrivateKey, ca: Path | None, insecure: bool) -> str:
    """The SuperLink's version of Flower; empty if it does not tell it."""
    try:
        return connections.version(str(address), key, None if insecure else ca, PATIENCE)
    except connections.CallError as error:
        raise _unanswered(address, error) from None


def knows(address: Address, key: ec.EllipticCurvePrivateKey, ca: Path | None, insecure: bool) -> bool:
    """True if the SuperLink has registered this key, even if its SuperNode is not running."""
    try:
        return connections.knows(str(address), key, None if insecure else ca, PATIENCE)
    except connections.ClockError as error:
        raise FaultError(
            f"{address} rejects this machine's signature: {error}",
            "set the clocks: a site's may be at most 5 s ahead of the server's, or 5 minutes behind",
        ) from None
    except connections.ElsewhereError:
        raise FaultError(f"{address} does not serve SuperNodes (Fleet API)", "check the port (default: 9092)") from None
    except connections.CallError as error:
        raise _unanswered(address, error) from None


def nodes(connection: str) -> Sequence[connections.NodeInfo]:
    """The nodes known to the SuperLink of that name in Flower's configuration."""
    config = connections.get_flwr_home() / connections.FLOWER_CONFIG_FILE
    if not config.exists():  # Flower would create one
        raise FaultError(
            f"there is no {config}", f"write it, with the SuperLink's address below [superlink.{connection}]"
        )
    try:
        address = connections.read_superlink_connection(connection).address or connections.LOCAL_SUPERLINK
        if address.startswith(":"):  # Flower would start one
            raise FaultError(f"{connection} is for simulations on this machine", f"name a SuperLink of {config}")
        return connections.nodes(connection, PATIENCE)
    except ClickException as error:
        raise FaultError(" ".join(error.message.split()), f"fix {config}") from None
    except connections.CallError as error:
        raise _unanswered(address, error) from None


def _unanswered(address: Address | str, error: Exception) -> FaultError:
    return FaultError(
        f"{address} does not answer like Flower {lines.installed()} ({error})",
        "check the SuperLink's log, and that its Flower has the version that fedclip-flwr needs",
    )
