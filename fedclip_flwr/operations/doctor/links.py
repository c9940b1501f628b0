"""Checks that server and site can reach and trust each other: certificates, ports, node keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509 import Certificate

from fedclip_flwr.base.errors import FaultError
from fedclip_flwr.flower import lines
from fedclip_flwr.flower.connections import NodeInfo, NodeStatus, public_key_to_bytes
from fedclip_flwr.operations import certificates
from fedclip_flwr.operations.doctor import endpoints
from fedclip_flwr.operations.doctor.endpoints import Address
from fedclip_flwr.operations.doctor.findings import Examination

SOON = 30
"""Days before a certificate expires from which on it gets a note."""
FLEET, CONTROL, APPS = "Fleet API", "Control API", "ServerAppIo API"
OTHERS = {APPS: 9091, CONTROL: 9093}
"""Other APIs of a SuperLink, which no site needs."""
EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Site:
    """The checked options of a SuperNode."""

    superlink: Address | None = None
    root_certificates: Path | None = None
    private_key: Path | None = None
    insecure: bool = False


@dataclass(frozen=True)
class Server:
    """The checked options of a SuperLink; its name for sites (`host`), and in Flower's configuration (`connection`)."""

    fleet: Address
    control: Address
    apps: Address
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False
    host: str = ""
    connection: str = ""


def examine_site(ex: Examination, site: Site) -> None:
    ca = None if site.insecure else site.root_certificates
    trusts = not ca or ex.look("CA", _authority, ex, ca)
    key = None
    if site.private_key:
        key = ex.look("node key", _node_key, ex, site.private_key)
    else:
        ex.note(
            "node key",
            "not given: a SuperLink with --enable-supernode-auth refuses such a site",
            "give --auth-supernode-private-key node.key (fedclip keys makes one)",
        )
    there = site.superlink
    if not there:
        ex.note("SuperLink", "not checked", "give --superlink HOST:9092 and --root-certificates ca.crt")
    elif trusts and ex.look(FLEET, _served, ex, FLEET, there, ca, there.host, site.insecure):
        if key and site.private_key:
            public = site.private_key.with_suffix(".pub")
            ex.look("registration", _registered, ex, there, ca, site.insecure, key, public)
        _others(ex, there.host, OTHERS, "unless this is the server itself, close that port in its firewall")


def examine_server(ex: Examination, server: Server) -> None:
    ca, host = None if server.insecure else server.ca, server.host
    fleet, control, apps = _own(server.fleet, host or "localhost"), _own(server.control), _own(server.apps)
    if ex.look("certificates", _files, ex, server):
        if server.insecure or ca:
            ex.look(FLEET, _served, ex, FLEET, fleet, ca, host or None, server.insecure)
            ex.look(CONTROL, _served, ex, CONTROL, control, ca, None, server.insecure)
        ex.look(APPS, _apps_served, ex, apps, ca)
        if host:
            ports = {CONTROL: control.port, APPS: apps.port}
            _others(ex, host, ports, "bind that API to 127.0.0.1")
    if server.connection:
        ex.look("nodes", _nodes, ex, server)
    else:
        ex.note("nodes", "not checked", "give --on NAME: the SuperLink's name in Flower's configuration")


def _authority(ex: Examination, ca: Path) -> bool:
    return _report(ex, "CA", certificates.read(ca), str(ca), str(ca))


def _report(ex: Examination, what: str, certificate: Certificate, whose: str, found: str) -> bool:
    """Reports that the certificate is valid, and until when."""
    left = certificates.days_left(certificate, whose)
    found = f"{found}, until {certificate.not_valid_after_utc:%Y-%m-%d}"
    if left < SOON:
        ex.note(what, f"{found}: {left} days are left", certificates.AGAIN)
    else:
        ex.ok(what, found)
    return True


def _node_key(ex: Examination, path: Path) -> ec.EllipticCurvePrivateKey:
    key = certificates.node_key(path)
    if ex.look("node key", certificates.check_secret, path):
        ex.ok("node key", f"{path}, {key.curve.name}, not open to all users")
    return key


def _served(
    ex: Examination, what: str, there: Address, ca: Path | None, name: str | None, insecure: bool = False
) -> bool:
    """True if that API answers, with TLS unless `insecure`; else raises."""
    if insecure:
        transport = endpoints.speaks_plainly(there)
        if not transport:
            raise FaultError(f"{there} does not answer without TLS", "leave out --insecure, and give the certificates")
        _match(there, transport)
        ex.note(what, f"{there} answers, without TLS: anyone in between can read and change messages")
        return True
    greeting = endpoints.greet(there, ca, name)
    _match(there, greeting.transport, greeting.flower)
    names = ", ".join(certificates.names_of(greeting.certificate))
    found = f"{there}, {greeting.tls}, {greeting.transport}, certificate for {names}"
    return _report(ex, what, greeting.certificate, f"the certificate of {there}", found)


def _match(there: Address, transport: str, flower: str = "") -> None:
    """Raises if the server there has another line of Flower than this machine, or another minor version."""
    own, ours = lines.installed(), lines.line()
    if transport == ours.transport and (not flower or _minor(flower) == _minor(own)):
        return
    theirs = f"Flower {flower}" if flower else "another Flower"
    release = _minor(flower) if flower else {each.transport: each.tested for each in lines.LINES}[transport]
    raise FaultError(
        f"{there} has {theirs} ({transport}), this machine Flower {own} ({ours.transport}); both sides need the same",
        f"pip install 'flwr=={release}.*' here, or 'flwr=={_minor(own)}.*' there",
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _registered(
    ex: Examination, there: Address, ca: Path | None, insecure: bool, key: ec.EllipticCurvePrivateKey, public: Path
) -> None:
    _match(there, lines.line().transport, flower := endpoints.version(there, key, ca, insecure))
    ex.ok("Flower", f"{flower or 'version not told'} there, {lines.installed()} here, {lines.line().transport}")
    if not endpoints.knows(there, key, ca, insecure):
        raise FaultError(
            f"{there} has not registered this node key",
            f"send {public} to the server's administrator: flwr supernode register {public.name} CONNECTION",
        )
    ex.ok("registration", f"{there} has registered this node key")


def _files(ex: Examination, server: Server) -> bool:
    """True if the certificates are valid or not needed; raises if they are not valid."""
    ca, certificate, key = server.ca, server.certificate, server.key
    if server.insecure:
        ex.note("certificates", "none, because of --insecure", "use TLS for any connection over a network")
        return True
    if not (ca and certificate and key):
        if ca or certificate or key:
            raise FaultError("only some are given", "give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile")
        ex.note("certificates", "not checked", "give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile")
        return True
    _authority(ex, ca)
    shown = certificates.read(certificate)
    names = ", ".join(certificates.names_of(shown)) or "no name"
    _report(ex, "certificate", shown, str(certificate), f"{certificate}, for {names}")
    certificates.rehearse(ca, certificate, key)
    if ex.look("server's key", certificates.check_secret, key):
        ex.ok("server's key", f"{key}, the certificate's, not open to all users")
    return True


def _own(bound: Address, host: str = "localhost") -> Address:
    """The address at which to test an API that is bound to `bound`."""
    return Address(host, bound.port) if bound.host in EVERYWHERE else bound


def _others(ex: Examination, host: str, ports: Mapping[str, int], remedy: str) -> None:
    """Notes ports that can be reached from here, although no site needs them."""
    for what, port in ports.items():
        if endpoints.listens(Address(host, port)):
            ex.note(what, f"port {port} of {host} can be reached from here, but no site needs it", remedy)


def _apps_served(ex: Examination, there: Address, ca: Path | None) -> None:
    if transport := endpoints.speaks_plainly(there):
        _match(there, transport)
        ex.ok(APPS, f"{there} answers, without TLS: keep it on this machine")
    else:
        _served(ex, APPS, there, ca, None)


def _nodes(ex: Examination, server: Server) -> None:
    """Reports the registered nodes, and if the keys beside the server's certificate are among them."""
    known = {node.public_key: node for node in endpoints.nodes(server.connection)}
    counts = Counter(node.status for node in known.values() if node.status != NodeStatus.UNREGISTERED)
    found = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    if counts:
        ex.ok("nodes", f"{server.connection} knows {counts.total()}: {found}")
    else:
        ex.note("nodes", f"{server.connection} knows none", f"flwr supernode register NODE.pub {server.connection}")
    for path in sorted(server.certificate.parent.glob("*.pub")) if server.certificate else ():
        ex.look(path.stem, _node, ex, path, known, server.connection)


def _public(path: Path) -> bytes:
    """The public key in Flower's form."""
    try:
        key = load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise FaultError(f"{path} has no public ECDSA key", "get it from its site again")
    return public_key_to_bytes(key)


def _node(ex: Examination, path: Path, known: Mapping[bytes, NodeInfo], connection: str) -> None:
    node = known.get(_public(path))
    if not node:
        raise FaultError(f"{path} is not registered", f"flwr supernode register {path} {connection}")
    if node.status == NodeStatus.UNREGISTERED:
        raise FaultError(
            f"{path} was unregistered, and Flower never accepts a key again",
            "delete it; if the site should return, it needs a new key: fedclip keys",
        )
    found = f"node {node.node_id} is {node.status}"  # Flower's own commands know the node only by this number
    if node.status == NodeStatus.ONLINE:
        ex.ok(path.stem, found)
    else:
        ex.note(path.stem, found, "run fedclip doctor site there to find out why")
