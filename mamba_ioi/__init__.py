"""Trace, patch and reverse-engineer Mamba language models: the circuits they compute, found with nnsight."""

from . import metrics
from .dataset import IOIDataset
from .model import MambaModel, load_model, planted
from .patching import Patch, cache, run
from .result import Result

__version__ = "0.1.0"
__all__ = [
    "IOIDataset",
    "MambaModel",
    "Patch",
    "Result",
    "cache",
    "load_model",
    "metrics",
    "planted",
    "run",
]
