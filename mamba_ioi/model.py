"""Where `mamba_ioi.models.model` was before 0.3: its public names are still to be had from here."""

from __future__ import annotations

from .models.model import CausalLM, MambaModel, load_model, planted, planted_recall, wrap

__all__ = ["CausalLM", "MambaModel", "load_model", "planted", "planted_recall", "wrap"]
