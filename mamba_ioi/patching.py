"""Where `Patch`, `cache` and `run` were before 0.3: they are still to be had from here."""

from __future__ import annotations

from .interventions.patch import Patch
from .interventions.run import ActivationCache, cache, run

__all__ = ["ActivationCache", "Patch", "cache", "run"]
