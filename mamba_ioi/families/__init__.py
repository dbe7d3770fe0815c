"""Families of models: one file each, which says what is peculiar to it. What a file calls ``FAMILY`` is found here."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from .family import Family
from .transformer import TRANSFORMER

FAMILIES: dict[str, Family] = {}
"""The families with sites of their own, by the ``model_type`` of their configs."""


def register(family: Family) -> None:
    """Let models of this family load with its sites; in place of an earlier one of the same ``model_type``."""
    FAMILIES[family.model_type] = family


def family_of(model_type: str, module: nn.Module | None = None) -> Family:
    """The family of that name, or what holds for any causal language model.

    Args:
        model_type: as the config has it.
        module: the model, where it is there: one of that type without a mixer of the family's is none of it.
    """
    family = FAMILIES.get(model_type, TRANSFORMER)
    return family if module is None or family.includes(module) else TRANSFORMER


for _file in iter_modules(__path__):
    _family = getattr(import_module(f"{__name__}.{_file.name}"), "FAMILY", None)
    if _family is not None:
        register(_family)
