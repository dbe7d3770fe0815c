"""Where `mamba_ioi.trace.s6_scan` was before 0.3: its public names are still to be had from here."""

from __future__ import annotations

from .trace.s6_scan import held_scan, scan_states, selective_scan

__all__ = ["held_scan", "scan_states", "selective_scan"]
