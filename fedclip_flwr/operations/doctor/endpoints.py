"""Probes of other machines: ports, TLS, and the nodes that a SuperLink knows. Nothing is changed there."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
from click import ClickException
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedclip_flwr.base import UserError
from fedclip_flwr.base.errors import FaultError
from fedclip_flwr.flower import connections
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
    """The server's side of a TLS handshake."""

    version: str
    certificate: x509.Certificate


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
    try:
        with connect(address) as plain, context.wrap_socket(plain, server_hostname=name) as secure:
            shown, version, protocol = _shown(secure), secure.version(), secure.selected_alpn_protocol()
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
    if protocol != "h2":
        raise FaultError(
            f"{address} supports TLS but not HTTP/2 (ALPN)",
            "check host and port; a proxy in between must pass TLS through, or support HTTP/2",
        )
    return Greeting(version or "TLS", shown)


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


def speaks_plainly(address: Address) -> bool:
    """True if an HTTP/2 server answers there without TLS."""
    with connect(address) as connection:
        try:
            connection.sendall(FIRST_WORDS)
            answer = connection.recv(9)
        except OSError:
            return False
    return len(answer) == 9 and answer[3] == 4


def knows(address: Address, key: ec.EllipticCurvePrivateKey, ca: Path | None, insecure: bool) -> bool:
    """True if the SuperLink has registered this key, even if its SuperNode is not running.

    It is asked to activate the node with an invalid heartbeat interval: Flower looks up the key before it refuses that,
    and changes nothing.
    """
    public = key.public_key()
    request = connections.ActivateNodeRequest(
        public_key=connections.public_key_to_bytes(public), heartbeat_interval=0.0
    )
    root = ca.read_bytes() if ca and not insecure else None
    signing = connections.NodeAuthClientInterceptor(key, public)
    channel = connections.create_channel(str(address), insecure, root, interceptors=[signing])
    try:
        connections.FleetStub(channel).ActivateNode(request, timeout=PATIENCE)
    except grpc.RpcError as error:
        code, details = _of(error)
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return True
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            return False
        if "timestamp" in details:
            raise FaultError(
                f"{address} rejects this machine's signature: {details}",
                "set the clocks: a site's may be at most 5 s ahead of the server's, or 5 minutes behind",
            ) from None
        if code == grpc.StatusCode.UNIMPLEMENTED:
            raise FaultError(
                f"{address} does not serve SuperNodes (Fleet API)", "check the port (default: 9092)"
            ) from None
        raise _unanswered(address, error) from None
    finally:
        channel.close()
    return True


def nodes(connection: str) -> Sequence[connections.NodeInfo]:
    """The nodes known to the SuperLink of that name in Flower's configuration."""
    config = connections.get_flwr_home() / connections.FLOWER_CONFIG_FILE
    if not config.exists():  # Flower would create one
        raise FaultError(
            f"there is no {config}", f"write it, with the SuperLink's address below [superlink.{connection}]"
        )
    try:
        found = connections.read_superlink_connection(connection)
        address = found.address or connections.LOCAL_SUPERLINK
        if address.startswith(":"):  # Flower would start one
            raise FaultError(f"{connection} is for simulations on this machine", f"name a SuperLink of {config}")
        channel = connections.init_channel_from_connection(found)
    except ClickException as error:
        raise FaultError(" ".join(error.message.split()), f"fix {config}") from None
    try:
        return list(
            connections.ControlStub(channel).ListNodes(connections.ListNodesRequest(), timeout=PATIENCE).nodes_info
        )
    except grpc.RpcError as error:
        raise _unanswered(address, error) from None
    finally:
        channel.close()


def _of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """The status and the message of a failed call."""
    assert isinstance(error, grpc.Call)  # true of all errors that a stub raises
    return error.code(), " ".join(str(error.details()).split())


def _unanswered(address: Address | str, error: grpc.RpcError) -> FaultError:
    code, details = _of(error)
    return FaultError(
        f"{address} does not answer like Flower 1.31 ({code.name}: {details})",
        "check the SuperLink's log, and that its Flower has the version that fedclip-flwr needs",
    )
