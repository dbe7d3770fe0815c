"""What is counted of the requests to a server, and how its URL is written."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Traffic:
    """What was sent to a server and came back, in compressed bytes."""

    requests: int = 0
    sent: int = 0
    received: int = 0


def public_url(url: str) -> str:
    """A URL without user name and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
