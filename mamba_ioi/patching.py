"""Where `mamba_ioi.interventions.patching` was before 0.3: its public names are still to be had from here."""

from __future__ import annotations

from .interventions.patching import ActivationCache, Patch, cache, run

__all__ = ["ActivationCache", "Patch", "cache", "run"]
