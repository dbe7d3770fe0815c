"""Where `mamba_ioi.interventions.sweep` was before 0.3: its public names are still to be had from here."""

from __future__ import annotations

from .interventions.sweep import Budget, Readout, Resample, picked, sweep

__all__ = ["Budget", "Readout", "Resample", "picked", "sweep"]
