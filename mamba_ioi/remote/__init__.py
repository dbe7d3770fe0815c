"""Runs on an NDIF server: the wire, and requests with their progress, their answers kept, and their resumption."""

from __future__ import annotations

from .requests import Remote, ask, serve
from .traffic import Traffic, public_url

__all__ = ["Remote", "Traffic", "ask", "public_url", "serve"]
