"""Where `mamba_ioi.tasks.names` was before 0.3: its public names are still to be had from here."""

from __future__ import annotations

from .tasks.names import NAMES, name_tokens, single_token_names

__all__ = ["NAMES", "name_tokens", "single_token_names"]
