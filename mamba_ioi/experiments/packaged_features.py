"""The features of the dictionaries that ship for a model: what `reproduce` asks of them."""

from __future__ import annotations

from typing import Any

from ..models.model import CausalLM
from ..result import Result
from ..tasks.pairs import PromptPairs
from ..zoo import DICTIONARIES
from ..zoo.dictionaries import load_dictionary
from .feature_edges import feature_edges
from .feature_effects import feature_effects
from .feature_faithfulness import feature_faithfulness


def packaged_effects(model: CausalLM, pairs: PromptPairs, *, progress: bool = True) -> Result:
    """`feature_effects` of the first dictionary that ships for the model.

    Raises:
        ValueError: if none ships for it.
    """
    return feature_effects(model, pairs, *packaged(model)[0], progress=progress)


def packaged_edges(model: CausalLM, pairs: PromptPairs, *, progress: bool = True) -> Result:
    """`feature_edges` from the first dictionary that ships for the model to the last.

    Raises:
        ValueError: if none ships for it.
    """
    first, *_, last = packaged(model)
    return feature_edges(model, pairs, first, last, top=20, progress=progress)


def packaged_faithfulness(
    model: CausalLM, pairs: PromptPairs, *, held_out: PromptPairs | None = None, progress: bool = True
) -> Result:
    """`feature_faithfulness` of the first dictionary that ships for the model.

    Args:
        model: the model.
        pairs: the pairs on which it is found which features matter most.
        held_out: the pairs to judge on; None for the same.
        progress: show a bar.

    Raises:
        ValueError: if no dictionary ships for the model.
    """
    first = packaged(model)[0]
    effects = feature_effects(model, pairs, *first, top=0, progress=progress)
    judged = pairs if held_out is None else held_out
    found = feature_faithfulness(model, judged, *first, effects=effects, progress=progress)
    return Result(found.table, found.meta | {"judged_on": "pairs" if held_out is None else "held_out"})


def packaged(model: CausalLM) -> list[tuple[Any, str, int]]:
    """The dictionaries that ship for a model, each with its site and layer, in the order of execution.

    Raises:
        ValueError: if none ships for it.
    """
    if model.model_id not in DICTIONARIES:
        raise ValueError(f"no dictionary of features ships for {model.model_id}; those of {', '.join(DICTIONARIES)} do")
    found = [load_dictionary(f"{model.model_id}/{site}") for site in DICTIONARIES[model.model_id]]
    return [(sae, *sae.place) for sae in found]
