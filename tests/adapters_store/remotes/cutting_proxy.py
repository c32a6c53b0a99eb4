"""A TCP proxy that counts what passes, and cuts connections after so many bytes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

_PIECE = 4096


class CuttingProxy:
    """Between a client and a server on loopback.

    Attributes:
        sent, received: bytes that went to the server and came back from it.
        cuts: how many connections were cut.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._on_cut: Callable[[], object] = lambda: None
        self._connections: list[socket.socket] = []
        self.reset()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Let everything pass, and count from zero."""
        with self._lock:
            self.sent = self.received = self.cuts = 0
            self._limits: tuple[int | None, int | None] = (None, None)
            self._remaining_cuts = 0

    def cut(
        self,
        after_sent: int | None = None,
        after_received: int | None = None,
        times: int = 1,
        on_cut: Callable[[], object] = lambda: None,
    ) -> None:
        """Cut a connection that brings the bytes since the last cut above a limit, so many times, calling `on_cut`."""
        self.reset()
        with self._lock:
            self._limits = (after_sent, after_received)
            self._since = [0, 0]
            self._remaining_cuts = times
            self._on_cut = on_cut

    def close(self) -> None:
        self._listener.close()
        for each in self._connections:
            _shut(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            self._connections += [client, server]
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        ways = ((0, client, server), (1, server, client))
        pumps = [threading.Thread(target=self._pump, args=way, daemon=True) for way in ways]
        for each in pumps:
            each.start()
        for each in pumps:
            each.join()
        client.close()
        server.close()

    def _pump(self, direction: int, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                if self._count(direction, len(piece)):
                    self._on_cut()
                    break
                target.sendall(piece)
        _shut(source)
        _shut(target)

    def _count(self, direction: int, size: int) -> bool:
        """Whether this piece is one too many; it is lost then, and not counted."""
        with self._lock:
            limit = self._limits[direction]
            if limit is not None and self._remaining_cuts:
                if self._since[direction] + size > limit:
                    self._remaining_cuts -= 1
                    self._since = [0, 0]
                    self.cuts += 1
                    return True
                self._since[direction] += size
            if direction == 0:
                self.sent += size
            else:
                self.received += size
            return False


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
