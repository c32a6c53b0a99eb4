"""Runs the web application until it is stopped."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress

from adapters_store.store import Store
from reft_plugins.errors import StoreError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(store: Store, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        host: an address or name of this machine. Bound to loopback, requests for any other host are refused.
        port: 0 for any that is free.
        listening: called with the URL once requests are accepted.

    Raises:
        StoreError: the address cannot be bound, or a library is missing.
    """
    try:
        import uvicorn

        from adapters_store.web.application import create_application
        from adapters_store.web.guard import LOOPBACK
    except ImportError as error:
        raise StoreError(
            f"the page needs {error.name}, which is not installed. pip install 'reft-plugins[store]'"
        ) from None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise StoreError(f"cannot listen on {host}, port {port}: {error}. Choose another --host or --port") from None
    hosts = (*LOOPBACK, f"[{host}]" if ":" in host else host) if is_loopback(host) else ("*",)
    application = create_application(store, hosts)
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, server_header=False, proxy_headers=False, lifespan="off"
    )
    shown = f"[{host}]" if ":" in host else host
    with bound, suppress(KeyboardInterrupt):
        listening(f"http://{shown}:{bound.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[bound])
