"""A relay between SuperNodes and a SuperLink, which sees all bytes of a connection."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple


class Streams(NamedTuple):
    """The bytes sent on one connection, in both directions."""

    sent: bytearray
    answered: bytearray


class Relay(socketserver.ThreadingTCPServer):
    """Forwards connections to a port of this machine; counts the bytes in both directions, and keeps them if `keep`.
    After `cut` it silently stops forwarding, until `mend`."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, keep: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.to, self.bytes, self.lock = port, 0, threading.Lock()
        self.keep = keep
        self.kept: list[Streams] = []
        self.connected = threading.Event()
        self.connected.set()

    def cut(self) -> None:
        self.connected.clear()

    def mend(self) -> None:
        self.connected.set()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Connection(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        streams = Streams(bytearray(), bytearray())
        self.server.kept.append(streams)
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.server.to)) as other:
            back = threading.Thread(target=self._pass_on, args=(other, self.request, streams.answered), daemon=True)
            back.start()
            self._pass_on(self.request, other, streams.sent)
            back.join()

    def _pass_on(self, come: socket.socket, go: socket.socket, stream: bytearray) -> None:
        with suppress(OSError):
            while data := come.recv(1 << 18):
                with self.server.lock:
                    self.server.bytes += len(data)
                if self.server.keep:
                    stream += data
                self.server.connected.wait()
                go.sendall(data)
        with suppress(OSError):
            go.shutdown(socket.SHUT_WR)


@contextmanager
def relayed(port: int, keep: bool = False) -> Iterator[Relay]:
    with Relay(port, keep) as relay:
        thread = threading.Thread(target=relay.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield relay
        finally:
            relay.shutdown()
            thread.join()
