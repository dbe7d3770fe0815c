"""Where `sweep`, `Resample` and `Readout` were before 0.3: they are still to be had from here."""

from __future__ import annotations

from .interventions.patch import Resample
from .interventions.readout import Readout, picked
from .interventions.sweep import Budget, sweep

__all__ = ["Budget", "Readout", "Resample", "picked", "sweep"]
