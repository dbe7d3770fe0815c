"""Where `mamba_ioi.tasks.ioi` was before 0.3: its public names are still to be had from here."""

from __future__ import annotations

from .tasks.ioi import ALIGNED_TEMPLATES, BOS, CORRUPTIONS, OBJECTS, PLACES, TEMPLATES, IOIDataset

__all__ = ["ALIGNED_TEMPLATES", "BOS", "CORRUPTIONS", "OBJECTS", "PLACES", "TEMPLATES", "IOIDataset"]
