"""Where `mamba_ioi.trace.sites` was before 0.3: its public names are still to be had from here."""

from __future__ import annotations

from .trace.sites import SITES, SiteInfo, owner

__all__ = ["SITES", "SiteInfo", "owner"]
