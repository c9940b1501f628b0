"""What is at the other end: ports, TLS, and which nodes a SuperLink knows. Nothing is changed there."""

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
from fedclip_flwr.flower.connections import (
    FLOWER_CONFIG_FILE,
    LOCAL_SUPERLINK,
    ActivateNodeRequest,
    ControlStub,
    FleetStub,
    ListNodesRequest,
    NodeAuthClientInterceptor,
    NodeInfo,
    create_channel,
    get_flwr_home,
    init_channel_from_connection,
    parse_address,
    public_key_to_bytes,
    read_superlink_connection,
)
from fedclip_flwr.operations import certificates

PATIENCE = 5.0
"""Seconds."""
FIRST_WORDS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""With which a client of HTTP/2 begins; the last nine bytes are a frame of settings, as the answer must be."""


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Greeting(NamedTuple):
    """What a server shows in a handshake."""

    version: str
    certificate: x509.Certificate


def read_address(text: str, option: str) -> Address:
    parsed = parse_address(text)
    if not parsed or not parsed[0] or not parsed[1]:
        raise UserError(f"{option} {text!r}: expected HOST:PORT, such as fl.example.org:9092")
    return Address(*parsed[:2])


def connect(address: Address) -> socket.socket:
    """A connection, or why there is none."""
    try:
        return socket.create_connection(address, PATIENCE)
    except (socket.gaierror, UnicodeError):
        found = f"the name {address.host} can't be resolved"
        remedy = "check its spelling; else ask who runs the network, or add it to /etc/hosts"
    except TimeoutError:
        found = f"{address} does not answer within {PATIENCE:g} s"
        remedy = f"check the address, and have the firewalls between let TCP port {address.port} through"
    except ConnectionRefusedError:
        found = f"{address} refuses connections: nothing listens there"
        remedy = "start the SuperLink, or check host and port (a firewall may refuse, too)"
    except OSError as error:
        found = f"{address} can't be reached ({error.strerror or error})"
        remedy = "check the address and this machine's network"
    raise FaultError(found, remedy)


def listens(address: Address) -> bool:
    """Whether anything takes connections there."""
    try:
        connect(address).close()
    except FaultError:
        return False
    return True


def greet(address: Address, ca: Path | None, name: str | None) -> Greeting:
    """What the server shows, if TLS works with it: signed by `ca`, and for `name` where there is one."""
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
                f"{address} speaks without TLS", "start the SuperLink with its certificates, not with --insecure"
            ) from None
        raise FaultError(
            f"TLS fails with {address} ({getattr(error, 'reason', None) or error.strerror or error})",
            "check host and port: this seems to be no SuperLink",
        ) from None
    if protocol != "h2":
        raise FaultError(
            f"{address} speaks TLS but not HTTP/2 (ALPN)",
            "check host and port; a proxy on the way must pass TLS through, or speak HTTP/2",
        )
    return Greeting(version or "TLS", shown)


def _look(address: Address) -> x509.Certificate:
    """The certificate that is shown there, whoever has signed it."""
    context = certificates.trusting(None)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with connect(address) as plain, context.wrap_socket(plain) as secure:
        return _shown(secure)


def _shown(secure: ssl.SSLSocket) -> x509.Certificate:
    return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")


def _silent(address: Address) -> FaultError:
    return FaultError(
        f"{address} takes connections, but says nothing within {PATIENCE:g} s",
        "check host and port; is a proxy or a firewall in between?",
    )


def speaks_plainly(address: Address) -> bool:
    """Whether a server of HTTP/2 answers there without TLS."""
    with connect(address) as connection:
        try:
            connection.sendall(FIRST_WORDS)
            answer = connection.recv(9)
        except OSError:
            return False
    return len(answer) == 9 and answer[3] == 4


def knows(address: Address, key: ec.EllipticCurvePrivateKey, ca: Path | None, insecure: bool) -> bool:
    """Whether the SuperLink has registered this key, be its SuperNode running or not.

    It is asked to activate the node with a pause between heartbeats that can't be: Flower looks the key up before it
    refuses that, and touches nothing.
    """
    public = key.public_key()
    request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0.0)
    root = ca.read_bytes() if ca and not insecure else None
    signing = NodeAuthClientInterceptor(key, public)
    channel = create_channel(str(address), insecure, root, interceptors=[signing])
    try:
        FleetStub(channel).ActivateNode(request, timeout=PATIENCE)
    except grpc.RpcError as error:
        code, details = _of(error)
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return True
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            return False
        if "timestamp" in details:
            raise FaultError(
                f"{address} refuses what this machine signs: {details}",
                "set the clocks: a site's may be 5 s ahead of the server's at most, and 5 minutes behind",
            ) from None
        if code == grpc.StatusCode.UNIMPLEMENTED:
            raise FaultError(
                f"{address} is not where SuperNodes are served (Fleet API)", "check the port: it is 9092 unless changed"
            ) from None
        raise _unanswered(address, error) from None
    finally:
        channel.close()
    return True


def nodes(connection: str) -> Sequence[NodeInfo]:
    """The nodes that the SuperLink knows which Flower's configuration calls so."""
    config = get_flwr_home() / FLOWER_CONFIG_FILE
    if not config.exists():  # Flower would write one
        raise FaultError(
            f"there is no {config}", f"write it, with the SuperLink's address below [superlink.{connection}]"
        )
    try:
        found = read_superlink_connection(connection)
        address = found.address or LOCAL_SUPERLINK
        if address.startswith(":"):  # Flower would start one
            raise FaultError(f"{connection} is for simulations on this machine", f"name a SuperLink of {config}")
        channel = init_channel_from_connection(found)
    except ClickException as error:
        raise FaultError(" ".join(error.message.split()), f"mend {config}") from None
    try:
        return list(ControlStub(channel).ListNodes(ListNodesRequest(), timeout=PATIENCE).nodes_info)
    except grpc.RpcError as error:
        raise _unanswered(address, error) from None
    finally:
        channel.close()


def _of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """A call's own words."""
    assert isinstance(error, grpc.Call)  # all that a stub raises are
    return error.code(), " ".join(str(error.details()).split())


def _unanswered(address: Address | str, error: grpc.RpcError) -> FaultError:
    code, details = _of(error)
    return FaultError(
        f"{address} does not answer as Flower 1.31 does ({code.name}: {details})",
        "look into the SuperLink's log; is its Flower the version that fedclip-flwr needs?",
    )
