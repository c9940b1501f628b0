"""The keys of real sites, as TLS and Flower take them."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from typer.testing import CliRunner

from fedclip_flwr.cli import app

SECRET = {"ca.key", "server.key", "node.key"}


def keys(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["keys", *map(str, arguments)])
    return result.exit_code, result.stdout + result.stderr


def made(*arguments: str | Path) -> str:
    code, output = keys(*arguments)
    assert code == 0, output
    return output


def refused(*arguments: str | Path) -> str:
    code, output = keys(*arguments)
    assert (code, output.count("\n")) == (2, 1), output
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def shake_hands(server: Path, ca: Path, name: str) -> None:
    """A TLS handshake between the server of that folder and somebody who knows the CA, and asks for the name."""
    here, there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    here.load_cert_chain(server / "server.crt", server / "server.key")
    there.load_verify_locations(ca)
    there.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [there.wrap_bio(down, up, server_hostname=name), here.wrap_bio(up, down, server_side=True)]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue


@pytest.fixture
def umask() -> Iterator[None]:
    """Nothing is kept from others unless the code does it."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_there_is_a_folder_for_each_machine_and_what_is_secret_is_the_owners_alone(tmp_path: Path, umask: None) -> None:
    folder = tmp_path / "keys"
    output = made(folder, "--server", "fl.example.org", "--site", "north", "--site", "south")
    assert files(folder).keys() == {
        *("ca/ca.key", "ca/ca.crt", "server/ca.crt", "server/server.crt", "server/server.key"),
        *("server/north.pub", "sites/north/ca.crt", "sites/north/node.key", "sites/north/node.pub"),
        *("server/south.pub", "sites/south/ca.crt", "sites/south/node.key", "sites/south/node.pub"),
    }
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600 if path.name in SECRET else 0o644), path
    for site in ("north", "south"):
        assert f"{folder}/sites/{site}" in output
        assert (folder / "server" / f"{site}.pub").read_bytes() == (folder / "sites" / site / "node.pub").read_bytes()
    assert "flwr supernode register" in output
    assert len({data for name, data in files(folder).items() if Path(name).name in SECRET}) == 4


@pytest.mark.parametrize("name", ["fl.example.org", "other.example.org", "10.0.0.5", "2001:db8::5", "localhost", "::1"])
def test_a_site_that_has_the_ca_trusts_the_server_by_each_of_its_names(name: str, tmp_path: Path) -> None:
    made(tmp_path, "--server", "FL.example.org, other.example.org,10.0.0.5,2001:db8::5", "--site", "north")
    shake_hands(tmp_path / "server", tmp_path / "sites" / "north" / "ca.crt", name)


def test_a_site_trusts_neither_another_name_nor_another_ca(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        made(tmp_path / folder, "--server", "fl.example.org")
    for ca, name in (("one", "fl.example.com"), ("one", "10.0.0.6"), ("two", "fl.example.org")):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(tmp_path / "one" / "server", tmp_path / ca / "server" / "ca.crt", name)


def test_certificates_say_what_they_are_for_and_how_long(tmp_path: Path) -> None:
    made(tmp_path / "a", "--server", "fl.example.org")
    made(tmp_path / "b", "--server", "fl.example.org", "--days", "30")
    ca, server = certificate(tmp_path / "a/ca/ca.crt"), certificate(tmp_path / "a/server/server.crt")
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value) == (True, x509.BasicConstraints(True, 0))
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)
    purposes = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]
    found = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert found.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(ip) for ip in ("127.0.0.1", "::1")]
    short = certificate(tmp_path / "b/server/server.crt")
    for end, days in ((ca, 3650), (server, 825), (short, 30)):
        left = end.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=days - 1) < left <= timedelta(days=days)
        assert end.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=1)  # for clocks that are behind


def test_flower_takes_both_halves_of_a_sites_key(tmp_path: Path) -> None:
    made(tmp_path, "--site", "münchen")
    folder = tmp_path / "sites" / "münchen"
    private = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert try_load_public_key(folder / "node.pub") == public_key_to_bytes(private.public_key())


def test_a_site_makes_its_key_alone_and_is_asked_to_send_the_public_half(tmp_path: Path) -> None:
    output = made(tmp_path / "keys", "--site", "north")
    assert files(tmp_path / "keys").keys() == {"sites/north/node.key", "sites/north/node.pub"}
    assert "send node.pub" in output


def test_what_is_there_is_kept_and_a_call_that_adds_a_site_adds_only_that(tmp_path: Path) -> None:
    first = ("--server", "fl.example.org", "--site", "north")
    made(tmp_path, *first)
    before = files(tmp_path)
    output = made(tmp_path, *first)
    assert files(tmp_path) == before
    assert "existed, kept" in output
    assert all("–" in line for line in output.splitlines() if line.startswith(str(tmp_path)))  # nothing made
    made(tmp_path, "--site", "south")
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    new = {"sites/south/ca.crt", "sites/south/node.key", "sites/south/node.pub", "server/south.pub"}
    assert after.keys() - before.keys() == new
    (tmp_path / "ca" / "ca.key").rename(tmp_path / "safe")  # sites can be added without what signs
    made(tmp_path, "--site", "west")


def test_a_site_that_was_first_gets_the_ca_and_is_added_to_the_server_later(tmp_path: Path) -> None:
    made(tmp_path, "--site", "north")
    key = (tmp_path / "sites/north/node.key").read_bytes()
    made(tmp_path, "--server", "fl.example.org", "--site", "north")
    assert (tmp_path / "sites/north/node.key").read_bytes() == key
    assert {"sites/north/ca.crt", "server/north.pub"} < files(tmp_path).keys()


def test_a_server_with_another_name_gets_another_certificate_from_the_same_ca(tmp_path: Path) -> None:
    made(tmp_path, "--server", "fl.example.org")
    before = files(tmp_path)
    message = refused(tmp_path, "--server", "new.example.org", "--site", "north")
    assert "fl.example.org" in message
    assert "new.example.org" in message
    assert "move it away and run again (the CA stays)" in message
    assert files(tmp_path) == before
    (tmp_path / "server/server.crt").rename(tmp_path / "old.crt")
    made(tmp_path, "--server", "new.example.org")
    after = files(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name != "server/server.crt")
    shake_hands(tmp_path / "server", tmp_path / "ca/ca.crt", "new.example.org")


class CutError(BaseException):
    """As when the process is killed."""


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_call_that_was_cut_off_anywhere_continues_when_it_is_given_again(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, sync, written = ("--server", "fl.example.org", "--site", "north"), os.fsync, []

    def stop(file: int) -> None:
        sync(file)
        if stat.S_ISDIR(os.fstat(file).st_mode):
            return
        written.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        if b"PRIVATE KEY" in written[-1].read_bytes():
            assert stat.S_IMODE(os.fstat(file).st_mode) == 0o600  # before anything is put in its place
        if len(written) == cut:
            raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nor does it tidy up
        with pytest.raises(CutError):
            keys(tmp_path, *given)
    before = {name: data for name, data in files(tmp_path).items() if not Path(name).name.startswith(".")}
    assert len(before) == cut - 1
    made(tmp_path, *given)
    assert before.items() <= files(tmp_path).items()
    shake_hands(tmp_path / "server", tmp_path / "sites/north/ca.crt", "fl.example.org")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ca/ca.key", "not an ECDSA key"),
        ("ca/ca.crt", "not a certificate"),
        ("server/server.key", "not an ECDSA key"),
        ("server/server.crt", "not a certificate"),
        ("server/ca.crt", "differs from"),
        ("server/north.pub", "differs from"),
        ("sites/north/node.key", "not an ECDSA key"),
        ("sites/north/node.pub", "another key than node.key"),
        ("sites/north/ca.crt", "differs from"),
    ],
)
def test_a_file_that_does_not_belong_there_is_named_and_left_alone(name: str, expected: str, tmp_path: Path) -> None:
    made(tmp_path, "--server", "fl.example.org", "--site", "north")
    (tmp_path / name).write_text("something else\n")
    before = files(tmp_path)
    message = refused(tmp_path, "--server", "fl.example.org", "--site", "north")
    assert expected in message
    assert str(tmp_path / name) in message
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ca/ca.key", "another key than ca.key"),
        ("server/server.key", "another key than server.key"),
        ("server/server.crt", "was not signed by this CA"),
        ("sites/north/node.key", "another key than node.key"),
    ],
)
def test_what_was_taken_from_other_keys_is_noticed(name: str, expected: str, tmp_path: Path) -> None:
    given = ("--server", "fl.example.org", "--site", "north")
    for folder in ("one", "two"):
        made(tmp_path / folder, *given)
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    assert expected in refused(tmp_path / "one", *given)


def made_ago(days: int, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(days=days)

    with monkeypatch.context() as patch:
        patch.setattr("fedclip_flwr.operations.keys.datetime", Then)
        made(*arguments)


def test_what_has_ended_is_reported_and_a_certificate_ends_with_its_ca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_ago(830, monkeypatch, tmp_path / "a", "--server", "fl.example.org")
    assert re.search(r"server.crt expired on .*: move it away", refused(tmp_path / "a", "--server", "fl.example.org"))
    made_ago(3600, monkeypatch, tmp_path / "b", "--server", "fl.example.org")
    (tmp_path / "b/server/server.crt").unlink()
    made(tmp_path / "b", "--server", "fl.example.org")
    left = certificate(tmp_path / "b/server/server.crt").not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=48) < left < timedelta(days=51)
    made_ago(3660, monkeypatch, tmp_path / "c", "--server", "fl.example.org")
    (tmp_path / "c/server/server.crt").unlink()
    assert "the CA expired on" in refused(tmp_path / "c", "--server", "fl.example.org")


def test_what_signs_is_asked_for_where_it_was_put_away(tmp_path: Path) -> None:
    made(tmp_path, "--server", "fl.example.org")
    (tmp_path / "ca/ca.key").unlink()
    assert "bring it back" in refused(tmp_path, "--server", "fl.example.org")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "nothing to make"),
        (["--site", "../north"], "expected a name"),
        (["--site", ".north"], "expected a name"),
        (["--site=-n"], "expected a name"),
        (["--site", ""], "expected a name"),
        (["--site", "a b"], "expected a name"),
        (["--site", "north", "--days", "9"], "together with --server"),
        (["--server", "x.org", "--days", "0"], "expected 1 to 3650"),
        (["--server", "x.org", "--days", "3651"], "expected 1 to 3650"),
        (["--server", "fl.example.org:9092"], "without a port"),
        (["--server", "https://fl.example.org"], "without a port"),
        (["--server", "x.org,"], "''"),
        (["--server", "-x.org"], "'-x.org'"),
        (["--server", "10.0.0.256"], "'10.0.0.256'"),
        (["--server", "0.0.0.0"], "by which sites reach it"),
        (["--server", "*.example.org"], "by which sites reach it"),
        (["--server", "münchen.example"], "by which sites reach it"),
        (["--server", "x" * 64 + ".org"], "by which sites reach it"),
    ],
)
def test_what_cannot_be_done_is_reported_in_one_line_and_nothing_is_made(
    given: list[str], expected: str, tmp_path: Path
) -> None:
    assert expected in refused(tmp_path / "keys", *given)
    assert not (tmp_path / "keys").exists()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "keys"):
        assert "set DIR to another folder" in refused(place, "--site", "north")
