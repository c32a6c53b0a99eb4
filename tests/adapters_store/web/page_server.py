"""Serves the page within the tests' process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from adapters_store import Store
from adapters_store.web.application import create_application


@contextmanager
def served(store: Store) -> Iterator[str]:
    """The page of a store on a free port of loopback; yields its address without the last slash."""
    config = uvicorn.Config(create_application(store), log_level="critical", lifespan="off", server_header=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()
