from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedclip_flwr.base import UserError
from fedclip_flwr.operations import ports
from fedclip_flwr.operations.ports import free_ports


def test_no_outgoing_connection_is_given_one() -> None:
    """A SuperNode's port was taken by another one's connection before it listened."""
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert max(free_ports(50)) < int(first)


def test_none_comes_again_soon() -> None:
    assert len({*free_ports(20), *free_ports(20)}) == 40


def test_another_process_has_others() -> None:
    command = "from fedclip_flwr.operations.ports import free_ports; print(*free_ports(30), flush=True); input()"
    others = [
        subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    given = {port for one in others if one.stdout for port in one.stdout.readline().split()}
    for one in others:
        one.communicate("\n")
    assert len(given | set(map(str, free_ports(30)))) == 4 * 30


def test_a_port_that_is_in_use_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    used, free = free_ports(2)
    monkeypatch.setattr(ports, "_block", lambda: (None, itertools.cycle([used, free])))
    monkeypatch.setattr(ports, "BLOCK", 3)
    with socket.create_server(("127.0.0.1", used)):
        assert free_ports(1) == [free]
        with pytest.raises(UserError, match="No free ports"):
            free_ports(2)
