"""All figures of a folder by one command: what is stored where, how each is made, and what is left to do."""

from __future__ import annotations

from importlib import import_module

_HOMES = {name: "folder" for name in ("ANSWERS", "REPORTS", "RESULTS", "locked", "stored_result")}
_HOMES |= {"reproduce": "run", "redraw": "run", "Outcome": "run"}


def __getattr__(name: str):
    """A name of the modules inside, imported when it is asked for: the report, which `run` imports, needs `folder`."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
