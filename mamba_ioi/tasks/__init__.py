"""Tasks: pairs of a clean and a corrupt prompt, whatever they are about, and the files they come from."""

from .pairs import PromptPairs

__all__ = ["PromptPairs"]
