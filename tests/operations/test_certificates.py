from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)

from fedclip_flwr.base.errors import FaultError
from fedclip_flwr.operations import certificates, keys
from tests.authority import Files, certify


def rehearse(files: Files) -> None:
    certificates.rehearse(files.ca, files.certificate, files.key)


def test_what_fedclip_keys_makes_is_good(tmp_path: Path) -> None:
    keys.make(tmp_path / "keys", "fl.example.org,10.0.0.5", ["north"])
    server, site = tmp_path / "keys" / "server", tmp_path / "keys" / "sites" / "north"
    rehearse(Files(site / "ca.crt", server / "server.crt", server / "server.key"))
    for secret in (server / "server.key", site / "node.key"):
        certificates.check_secret(secret)
    assert certificates.node_key(site / "node.key").curve.name == "secp384r1"
    shown = certificates.read(server / "server.crt")
    assert certificates.names_of(shown)[:2] == ["fl.example.org", "10.0.0.5"]
    assert certificates.days_left(shown, "it") == keys.SERVER_DAYS - 1


@pytest.mark.parametrize(
    ("dates", "expected"),
    [({"ends": -1}, r"server.crt has expired on 20"), ({"begins": 1}, r"server.crt is not valid before 20.*clock")],
)
def test_a_certificate_out_of_its_time_is_reported(tmp_path: Path, dates: dict[str, int], expected: str) -> None:
    files = certify(tmp_path / "own", **{"begins": -2, **dates})  # type: ignore[arg-type]
    with pytest.raises(FaultError, match=expected):
        rehearse(files)


def test_a_certificate_of_another_authority_is_reported(tmp_path: Path) -> None:
    """Although both authorities have the same name."""
    own, other = (certify(tmp_path / name) for name in ("own", "other"))
    with pytest.raises(FaultError, match=r"signed by another authority \(CN=an authority\) than .*other/ca.crt"):
        certificates.rehearse(other.ca, own.certificate, own.key)


def test_a_key_that_is_not_the_certificates_is_reported(tmp_path: Path) -> None:
    own, other = (certify(tmp_path / name) for name in ("own", "other"))
    with pytest.raises(FaultError, match=r"server.crt belongs to another key than .*other/server.key"):
        certificates.rehearse(own.ca, own.certificate, other.key)


def test_a_certificate_without_names_has_none(tmp_path: Path) -> None:
    assert certificates.names_of(certificates.read(certify(tmp_path / "own", names=()).certificate)) == []


def _locked(path: Path) -> None:
    """A key with a passphrase, as ssh-keygen writes it; what is locked in is nothing."""

    def text(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    public = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    how = text(b"aes256-ctr") + text(b"bcrypt") + text(text(bytes(16)) + (16).to_bytes(4, "big"))
    body = b"openssh-key-v1\0" + how + (1).to_bytes(4, "big") + text(b64decode(public.split()[1])) + text(bytes(64))
    lines = ["-----BEGIN OPENSSH PRIVATE KEY-----", b64encode(body).decode(), "-----END OPENSSH PRIVATE KEY-----", ""]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("prepare", "look", "expected"),
    [
        (lambda path: None, certificates.node_key, "can't be read \\(No such file"),
        (lambda path: path.write_bytes(b"nothing"), certificates.node_key, "no ECDSA key in OpenSSH's format"),
        (_locked, certificates.node_key, "has a passphrase"),
        (lambda path: path.write_bytes(b"nothing"), certificates.read, "no certificate in PEM format"),
        (lambda path: path.write_bytes(b"nothing"), certificates.trusting, "no certificate that TLS can use"),
        (lambda path: path.touch(0o644), certificates.check_secret, "open to all users.*mode 644.*chmod 600"),
        (lambda path: None, certificates.check_secret, "can't be read \\(No such file"),
    ],
)
def test_files_that_can_not_be_used_are_reported(
    tmp_path: Path, prepare: Callable[[Path], Any], look: Callable[[Path], Any], expected: str
) -> None:
    prepare(tmp_path / "file")
    with pytest.raises(FaultError, match=expected):
        look(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "expected"), [(b"nothing", "no private key in PEM format"), (None, "has a passphrase")]
)
def test_a_servers_key_that_can_not_be_used_is_reported(tmp_path: Path, text: bytes | None, expected: str) -> None:
    files = certify(tmp_path / "own")
    if text is None:
        locked = ec.generate_private_key(ec.SECP384R1()), BestAvailableEncryption(b"a secret")
        files.key.write_bytes(locked[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked[1]))
    else:
        files.key.write_bytes(text)
    with pytest.raises(FaultError, match=expected):
        rehearse(files)
