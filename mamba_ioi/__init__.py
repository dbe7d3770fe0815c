"""Trace, patch and reverse-engineer Mamba language models: the circuits they compute, found with nnsight."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import circuits, experiments, metrics, reference, tasks
    from .experiments import bottleneck
    from .interventions.cut import Cut
    from .interventions.generation import generate
    from .interventions.patch import Patch
    from .interventions.run import cache, run
    from .interventions.splice import Splice
    from .interventions.stream import StoredCache, activations, cache_to
    from .interventions.token_to_token import hidden_attention, token_contributions
    from .models.model import MambaModel, load_model, planted, planted_recall
    from .result import Result
    from .tasks import PromptPairs
    from .tasks.ioi import IOIDataset
    from .zoo.dictionaries import load_dictionary

__version__ = "0.2.0"
__all__ = [
    "Cut",
    "IOIDataset",
    "MambaModel",
    "Patch",
    "PromptPairs",
    "Result",
    "Splice",
    "StoredCache",
    "activations",
    "bottleneck",
    "cache",
    "cache_to",
    "circuits",
    "experiments",
    "generate",
    "hidden_attention",
    "load_dictionary",
    "load_model",
    "metrics",
    "planted",
    "planted_recall",
    "reference",
    "run",
    "tasks",
    "token_contributions",
]

_HOMES = {
    "Cut": "interventions.cut",
    "IOIDataset": "tasks.ioi",
    "MambaModel": "models.model",
    "Patch": "interventions.patch",
    "PromptPairs": "tasks",
    "Result": "result",
    "Splice": "interventions.splice",
    "StoredCache": "interventions.stream",
    "activations": "interventions.stream",
    "bottleneck": "experiments",
    "cache": "interventions.run",
    "cache_to": "interventions.stream",
    "generate": "interventions.generation",
    "hidden_attention": "interventions.token_to_token",
    "load_dictionary": "zoo.dictionaries",
    "load_model": "models.model",
    "planted": "models.model",
    "planted_recall": "models.model",
    "run": "interventions.run",
    "token_contributions": "interventions.token_to_token",
}


def __getattr__(name: str):
    """Import a public name when it is first asked for, so that the command line starts without torch (PEP 562)."""
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in __all__:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
