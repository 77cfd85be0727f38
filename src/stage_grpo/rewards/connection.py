"""Reaching servers over HTTP: what reward servers and chat servers have in common."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx2 as httpx

HEALTH_SECONDS = 10.0
"""How long a server may take to say that it is there."""


def open_client(url: str, headers: Any, timeout: float) -> httpx.Client:
    """A client of one server, whose requests name paths below its address.

    Args:
        url: Address of the server.
        headers: Sent with every request.
        timeout: Seconds without a byte after which an answer is given up.
    """
    import httpx2 as httpx

    base = url.rstrip("/") + "/"
    # A proxy that is set up for the internet does not lead back to this machine.
    local = is_loopback(urlsplit(base).hostname or "")
    return httpx.Client(base_url=base, headers=headers, timeout=timeout, trust_env=not local)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, under an address that no other one can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def in_words(error: Exception) -> str:
    """What went wrong with a request, for people."""
    kind = {"ConnectError": "cannot be reached", "ReadTimeout": "gave no answer in time"}.get(type(error).__name__)
    return f"{kind} ({error})" if kind else str(error) or type(error).__name__
