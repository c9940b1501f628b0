from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from deploy import processes
from fedclip_flwr.base.errors import FaultError, UserError
from fedclip_flwr.flower import lines
from fedclip_flwr.operations import certificates, keys, simulation
from fedclip_flwr.operations.doctor import endpoints
from fedclip_flwr.operations.doctor.endpoints import Address
from tests.authority import certify, serving
from tests.flower import parts


@contextmanager
def listening(backlog: int = 5) -> Iterator[Address]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as server:
        yield Address("127.0.0.1", server.getsockname()[1])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "PATIENCE", 0.3)


TRANSPORTS = tuple(line.transport for line in lines.LINES)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_with_tls_shows_its_certificate(tmp_path: Path, transport: str) -> None:
    files = certify(tmp_path / "own", ["localhost", "fl.example.org"])
    with serving(files, transport) as address:
        greeting = endpoints.greet(address, files.ca, "localhost")
        assert (
            endpoints.greet(address, files.ca, "fl.example.org") == endpoints.greet(address, files.ca, None) == greeting
        )
        assert not endpoints.speaks_plainly(address)
    assert (greeting.tls, greeting.transport, greeting.flower) == ("TLSv1.3", transport, "")
    assert certificates.names_of(greeting.certificate) == ["localhost", "fl.example.org"]


@pytest.mark.parametrize(
    ("faults", "name", "expected"),
    [
        ({"begins": -3, "ends": -2}, None, r"certificate of localhost:\d+ has expired on 20"),
        ({"begins": 2}, None, "is not valid before 20.*check the clock"),
        ({"names": ["a.example", "b.example"]}, "localhost", "is for a.example, b.example, not for localhost"),
        ({"names": ()}, "localhost", "is for no name, not for localhost"),
    ],
)
def test_a_certificate_that_is_no_good_is_reported(
    tmp_path: Path, faults: dict[str, int], name: str, expected: str
) -> None:
    files = certify(tmp_path / "own", **faults)  # type: ignore[arg-type]
    with serving(files) as address, pytest.raises(FaultError, match=expected):
        endpoints.greet(address, files.ca, name)


@pytest.mark.parametrize("known", [True, False])
def test_another_authoritys_server_is_reported(tmp_path: Path, known: bool) -> None:
    own, other = (certify(tmp_path / name) for name in ("own", "other"))
    by = str(other.ca) if known else "those that this machine trusts"
    with serving(own) as address, pytest.raises(FaultError, match=f"another authority .* than {re.escape(by)}"):
        endpoints.greet(address, other.ca if known else None, "localhost")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_without_tls_is_reported(tmp_path: Path, transport: str) -> None:
    with serving(None, transport) as address:
        assert endpoints.speaks_plainly(address) == transport
        with pytest.raises(FaultError, match=r"does not use TLS.*not with --insecure"):
            endpoints.greet(address, certify(tmp_path / "own").ca, "localhost")


def test_a_name_that_does_not_exist_is_reported() -> None:
    for host in ("nowhere.invalid", "a" * 70 + ".invalid"):
        with pytest.raises(FaultError, match="can't be resolved") as error:
            endpoints.connect(Address(host, 9092))
        assert host in str(error.value)


def test_a_closed_port_is_reported() -> None:
    with listening() as address:
        assert endpoints.listens(address)
    assert not endpoints.listens(address)
    with pytest.raises(FaultError, match="refuses connections"):
        endpoints.connect(address)


@pytest.mark.usefixtures("impatient")
def test_an_address_that_does_not_answer_is_reported() -> None:
    """A full queue of connections is as silent as a firewall."""
    with listening(backlog=0) as address, ExitStack() as stack:
        stack.enter_context(socket.create_connection(address))
        with pytest.raises(FaultError, match=r"does not answer within 0.3 s"):
            endpoints.connect(address)


@pytest.mark.usefixtures("impatient")
def test_a_port_that_says_nothing_is_reported(tmp_path: Path) -> None:
    with listening() as address:
        with pytest.raises(FaultError, match="accepts connections, but sends nothing"):
            endpoints.greet(address, None, None)
        assert not endpoints.speaks_plainly(address)


@pytest.mark.parametrize("text", ["fl.example.org", "fl.example.org:http", ":9092", "fl.example.org:0", "host:70000"])
def test_an_address_without_a_host_or_a_port_is_reported(text: str) -> None:
    with pytest.raises(UserError, match=r"--superlink .* expected HOST:PORT"):
        endpoints.read_address(text, "--superlink")


def test_addresses_are_read_and_shown_as_flower_has_them() -> None:
    assert endpoints.read_address("[::1]:9092", "--superlink") == Address("::1", 9092)
    assert str(Address("::1", 9092)) == "[::1]:9092"
    assert str(endpoints.read_address("localhost:1", "--superlink")) == "localhost:1"


# A real SuperLink


def own_key(link: processes.SuperLink, site: str) -> Path:
    assert link.keys
    return link.keys / "sites" / site / "node.key"


def knows(link: processes.SuperLink, site: str, port: int | None = None) -> bool:
    key = own_key(link, site)
    address = Address("localhost", port or link.fleet)
    return endpoints.knows(address, certificates.node_key(key), key.with_name("ca.crt"), False)


def test_a_superlink_says_whether_it_knows_a_key(secured: processes.SuperLink) -> None:
    assert knows(secured, "north")
    assert not knows(secured, "south")


def test_a_supernode_that_is_there_is_not_disturbed(
    secured: processes.SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(secured.folder))

    def known() -> list[Any]:
        """But for those that other tests have unregistered."""
        return [node for node in endpoints.nodes(simulation.CONNECTION) if node.status != "unregistered"]

    assert [node.status for node in known()] == ["registered"]
    assert knows(secured, "north")
    (before,) = known()
    assert (before.status, before.last_activated_at) == ("registered", "")
    with processes.supernode(secured, "north", "site='north'") as node:
        secured.wait_for([node], print)
        (before,) = known()
        assert knows(secured, "north")
        (after,) = known()
        assert node.process.poll() is None
    assert before.status == after.status == "online"
    assert (before.last_activated_at, before.heartbeat_interval) == (after.last_activated_at, after.heartbeat_interval)


def test_another_api_is_reported(secured: processes.SuperLink) -> None:
    with pytest.raises(FaultError, match="does not serve SuperNodes"):
        knows(secured, "north", secured.control)


def test_a_clock_that_is_wrong_is_reported(secured: processes.SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (timedelta(minutes=10), timedelta(minutes=-10)):
        parts.shift_clock(monkeypatch, wrong)
        with pytest.raises(FaultError, match=r"rejects this machine's signature.*set the clocks"):
            knows(secured, "north")


def test_whoever_does_not_answer_as_flower_does_is_reported(tmp_path: Path) -> None:
    keys.make(tmp_path / "keys", sites=["north"])
    key = certificates.node_key(tmp_path / "keys" / "sites" / "north" / "node.key")
    with listening() as address:
        pass
    with pytest.raises(
        FaultError, match=rf"does not answer like Flower {re.escape(lines.installed())} .(UNAVAILABLE|ConnectError)"
    ):
        endpoints.knows(address, key, None, True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "there is no .*config.toml"),
        ('[superlink.other]\naddress = "127.0.0.1:1"\n', "'here' not found"),
        ('[superlink.here]\naddress = ":local:"\n', "here is for simulations on this machine"),
        ('[superlink.here]\naddress = "127.0.0.1:1"\ninsecure = true\n', "127.0.0.1:1 does not answer"),
        ('[superlink.here]\naddress = "127.0.0.1:1"\nroot-certificates = "/nowhere"\n', "/nowhere"),
        ("[superlink", "config.toml"),
    ],
)
def test_a_connection_that_can_not_be_used_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str | None, expected: str
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    if config:
        (tmp_path / "config.toml").write_text(config)
    with pytest.raises(FaultError, match=expected):
        endpoints.nodes("here")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["config.toml"] if config else [])
