from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy import processes
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.flower import lines
from fedclip_flwr.operations import keys, simulation
from fedclip_flwr.operations.doctor import endpoints, links
from fedclip_flwr.operations.doctor.endpoints import Address
from fedclip_flwr.operations.doctor.findings import OK, Examination
from tests.authority import certify, serving

States = list[tuple[str, str]]


def of_site(**options: Any) -> Examination:
    ex = Examination(lambda _: None)
    links.examine_site(ex, links.Site(**options))
    return ex


def of_server(link: processes.SuperLink | None = None, **options: Any) -> Examination:
    """With the ports and the certificates of a SuperLink that is there."""
    if link and link.keys:
        own = link.keys / "server"
        files = {"ca": own / "ca.crt", "certificate": own / "server.crt", "key": own / "server.key"}
        options = {**files, **options}
    fleet, control, apps = (
        Address("0.0.0.0", p) for p in ((link.fleet, link.control, link.apps) if link else (1, 1, 1))
    )
    ex = Examination(lambda _: None)
    links.examine_server(ex, links.Server(fleet, control, apps, **options))
    return ex


def states(ex: Examination) -> States:
    return [(finding.state, finding.what) for finding in ex.findings]


def options_of(link: processes.SuperLink, site: str) -> dict[str, Any]:
    assert link.keys
    own = link.keys / "sites" / site
    there = Address("localhost", link.fleet)
    return {"superlink": there, "root_certificates": own / "ca.crt", "private_key": own / "node.key"}


def test_a_site_that_is_registered_has_all_that_it_needs(secured: processes.SuperLink) -> None:
    ex = of_site(**options_of(secured, "north"))
    assert states(ex) == [(OK, what) for what in ("CA", "node key", "Fleet API", "Flower", "registration")]
    transport = lines.line().transport
    assert f"TLSv1.3, {transport}, certificate for localhost, 127.0.0.1, ::1, until 20" in ex.findings[2].found
    assert ex.findings[3].found == f"{lines.installed()} there, {lines.installed()} here, {transport}"


OTHER = next(line for line in lines.LINES if line is not lines.line())


@pytest.mark.parametrize("secured", [True, False])
def test_a_server_of_the_other_line_is_refused_with_the_command_that_mends_it(tmp_path: Path, secured: bool) -> None:
    files = certify(tmp_path / "own") if secured else None
    with serving(files, OTHER.transport) as address:
        ex = of_site(superlink=address, root_certificates=files and files.ca, insecure=not secured)
    failed = ex.findings[-1]
    assert (failed.state, failed.what) == ("FAIL", "Fleet API")
    assert f"another Flower ({OTHER.transport}), this machine Flower {lines.installed()} (" in failed.found
    minor = lines.line().tested
    assert failed.remedy == f"pip install 'flwr=={OTHER.tested}.*' here, or 'flwr=={minor}.*' there"


def test_a_server_of_another_version_of_the_same_line_is_refused(
    secured: processes.SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = lines.installed()
    monkeypatch.setattr(lines, "installed", lambda: f"{there.rsplit('.', 2)[0]}.77.1")
    ex = of_site(**options_of(secured, "north"))
    (failed,) = (finding for finding in ex.findings if finding.state == "FAIL")
    assert f"has Flower {there} (" in failed.found
    assert "this machine Flower 1.77.1 (" in failed.found
    assert failed.remedy.startswith(f"pip install 'flwr=={lines.line().tested}.*' here")


def test_a_site_that_is_not_registered_reads_what_to_ask_for(secured: processes.SuperLink) -> None:
    ex = of_site(**options_of(secured, "south"))
    (failed,) = (finding for finding in ex.findings if finding.state == "FAIL")
    assert failed.what == "registration"
    assert "has not registered this node key" in failed.found
    assert "flwr supernode register" in failed.remedy


def test_ports_that_no_site_needs_are_reported(secured: processes.SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "OTHERS", {"Control API": secured.control, "nothing": 1})
    assert states(of_site(**options_of(secured, "north")))[-1] == ("note", "Control API")


def test_what_can_not_be_known_after_a_failure_is_not_looked_at(secured: processes.SuperLink, tmp_path: Path) -> None:
    options = options_of(secured, "north")
    ex = of_site(**{**options, "root_certificates": certify(tmp_path / "other").ca})
    assert states(ex) == [("ok", "CA"), ("ok", "node key"), ("FAIL", "Fleet API")]
    assert "signed by another authority" in ex.findings[-1].found
    ex = of_site(**{**options, "root_certificates": tmp_path / "nowhere.crt"})
    assert states(ex) == [("FAIL", "CA"), ("ok", "node key")]
    ex = of_site(**{**options, "superlink": Address("localhost", 1)})
    assert states(ex) == [("ok", "CA"), ("ok", "node key"), ("FAIL", "Fleet API")]
    assert "refuses connections" in ex.findings[-1].found


def test_what_was_not_named_for_a_site_is_noted() -> None:
    assert states(of_site()) == [("note", "node key"), ("note", "SuperLink")]


def test_a_key_that_everybody_can_read_is_reported(secured: processes.SuperLink, tmp_path: Path) -> None:
    key = tmp_path / "node.key"
    key.write_bytes(options_of(secured, "north")["private_key"].read_bytes())
    key.chmod(0o644)
    assert states(of_site(private_key=key)) == [("FAIL", "node key"), ("note", "SuperLink")]


def test_a_servers_key_that_everybody_can_read_is_reported(tmp_path: Path) -> None:
    files = certify(tmp_path / "own")
    files.key.chmod(0o604)
    ex = of_server(ca=files.ca, certificate=files.certificate, key=files.key)
    assert states(ex)[:3] == [("ok", "CA"), ("ok", "certificate"), ("FAIL", "server's key")]
    assert ex.findings[2].remedy == f"chmod 600 {files.key}"


def test_an_authority_that_has_expired_is_reported(tmp_path: Path) -> None:
    """A certificate that was signed before goes with it."""
    files = certify(tmp_path / "own", ends=-1, begins=-2)
    ex = of_site(root_certificates=files.certificate, superlink=Address("localhost", 1))
    assert states(ex) == [("FAIL", "CA"), ("note", "node key")]
    assert "has expired on" in ex.findings[0].found


def test_a_link_without_tls_is_noted_and_one_with_it_is_not_taken_for_one(tmp_path: Path) -> None:
    with serving(None) as address:
        ex = of_site(superlink=address, insecure=True)
        assert states(ex)[-1] == ("note", "Fleet API")
        assert "anyone in between can read" in ex.findings[-1].found
    with serving(certify(tmp_path / "own")) as address:
        ex = of_site(superlink=address, insecure=True)
        assert states(ex)[-1] == ("FAIL", "Fleet API")
        assert "leave out --insecure" in ex.findings[-1].remedy


def test_a_certificate_that_ends_soon_is_noted(tmp_path: Path) -> None:
    files = certify(tmp_path / "own", ends=10)
    with serving(files) as address:
        ex = of_site(superlink=address, root_certificates=files.ca)
    assert states(ex)[-1] == ("note", "Fleet API")
    assert "9 days are left" in ex.findings[-1].found


def test_a_server_reports_its_files_its_ports_and_its_sites(
    secured: processes.SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(secured.folder))
    ex = of_server(secured, connection=simulation.CONNECTION)
    assert states(ex) == [
        ("ok", "CA"),
        ("ok", "certificate"),
        ("ok", "server's key"),
        ("ok", "Fleet API"),
        ("ok", "Control API"),
        ("ok", "ServerAppIo API"),
        ("ok", "nodes"),
        ("note", "north"),
        ("FAIL", "south"),
    ]
    assert "without TLS" in ex.findings[5].found
    assert "knows 1: 1 " in ex.findings[6].found
    (node,) = (node for node in endpoints.nodes(simulation.CONNECTION) if node.status != "unregistered")
    assert ex.findings[7].found == f"node {node.node_id} is {node.status}"
    assert secured.keys
    south = secured.keys / "server" / "south.pub"
    assert ex.findings[-1].remedy == f"flwr supernode register {south} {simulation.CONNECTION}"


def test_a_key_that_was_unregistered_is_reported_as_of_no_use(
    secured: processes.SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(secured.folder))
    assert secured.keys
    keys.make(secured.keys, sites=["east"])
    public = secured.keys / "server" / "east.pub"
    before = {node.node_id for node in endpoints.nodes(simulation.CONNECTION)}
    secured.register("east")
    (node,) = {node.node_id for node in endpoints.nodes(simulation.CONNECTION)} - before
    secured.ask("supernode", "unregister", str(node))
    try:
        ex = of_server(secured, connection=simulation.CONNECTION)
    finally:
        public.unlink()
    (found,) = (finding for finding in ex.findings if finding.what == "east")
    assert found.found == f"{public} was unregistered, and Flower never accepts a key again"
    assert "a new key: fedclip keys" in found.remedy
    with pytest.raises(UserError, match="already in use"):
        secured.ask("supernode", "register", str(secured.keys / "sites" / "east" / "node.pub"))


def test_ports_that_are_not_for_sites_should_not_be_reached_by_the_servers_name(secured: processes.SuperLink) -> None:
    ex = of_server(secured, host="localhost")
    assert states(ex)[6:8] == [("note", "Control API"), ("note", "ServerAppIo API")]
    assert "127.0.0.1" in ex.findings[6].remedy


def test_a_server_that_is_not_running_is_reported(tmp_path: Path) -> None:
    files = certify(tmp_path / "own")
    ex = of_server(ca=files.ca, certificate=files.certificate, key=files.key)
    assert states(ex)[3:] == [
        ("FAIL", "Fleet API"),
        ("FAIL", "Control API"),
        ("FAIL", "ServerAppIo API"),
        ("note", "nodes"),
    ]


def test_a_servers_certificate_for_another_name_is_reported(tmp_path: Path) -> None:
    files = certify(tmp_path / "own", ["fl.example.org"])
    ex = Examination(lambda _: None)
    with serving(files) as there:
        own = files.ca, files.certificate, files.key
        links.examine_server(ex, links.Server(Address("0.0.0.0", there.port), there, there, *own, host="localhost"))
    assert states(ex)[3:6] == [("FAIL", "Fleet API"), ("ok", "Control API"), ("ok", "ServerAppIo API")]
    assert "is for fl.example.org, not for localhost" in ex.findings[3].found


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"ca": Path("ca.crt")}, ("FAIL", "only some are given")),
        ({}, ("note", "not checked")),
        ({"insecure": True}, ("note", "none, because of --insecure")),
    ],
)
def test_certificates_that_are_not_there_are_reported(options: dict[str, Any], found: tuple[str, str]) -> None:
    first = of_server(**options).findings[0]
    assert (first.state, first.found) == found


def test_a_public_key_that_is_none_is_reported(
    secured: processes.SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(secured.folder))
    files = certify(tmp_path / "own")
    files.certificate.with_name("west.pub").write_text("nothing")
    ex = of_server(certificate=files.certificate, ca=files.ca, key=files.key, connection=simulation.CONNECTION)
    assert states(ex)[-1] == ("FAIL", "west")
    assert "has no public ECDSA key" in ex.findings[-1].found
