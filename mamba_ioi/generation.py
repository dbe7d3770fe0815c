"""Where `mamba_ioi.interventions.generation` was before 0.3: its public names are still to be had from here."""

from __future__ import annotations

from .interventions.generation import generate

__all__ = ["generate"]
