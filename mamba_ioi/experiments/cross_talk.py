"""Figure 6: the smallest set of layers that must move information between tokens, for each kind of prompt."""

from __future__ import annotations

import logging

import pandas as pd
from tqdm.auto import tqdm

from ..checks import real_number
from ..interventions.patch import Resample
from ..interventions.readout import Readout
from ..interventions.sweep import sweep
from ..models.model import MambaModel
from ..result import Result
from ..tasks.pairs import PromptPairs
from .common import best_run, candidate_scores, check_data, mean_with_interval, rows_by_group

logger = logging.getLogger(__name__)
COLUMNS = ("step", "layer", "accuracy", "low", "high", "probability", "n")


def cross_talk(model: MambaModel, data: PromptPairs, target: float = 0.9, *, progress: bool = True) -> Result:
    """Restore layers' cross-talk one by one until the model answers, for each kind of pairs in the data.

    A layer's conv input (``in_proj``) resampled at all positions keeps it from moving anything between tokens that
    the clean prompt has and the corrupt one has not. So does its attention's input (``attn_in``) in a hybrid; of a
    Zamba2's layer that has a shared block, ``layer_input``, which what that block's attention moves is in. A layer that
    moves nothing between tokens, an MLP alone, is always as it is. The start is all other layers resampled; then,
    step by step, the layer is restored that raises accuracy most, until accuracy is above ``target`` or every layer is
    restored (paper, Section 4.1.3). Of layers that reach the same accuracy, the one of higher mean probability of the
    answer is restored; of those, the lowest.

    Args:
        model: a Mamba.
        data: pairs of prompts; they need not be aligned. A kind is a (template, corruption) where the data have both
            groups, else a label of their first group. `balanced_pairs` draws as many of the paper's pairs of each kind.
        target: the accuracy to exceed, from 0 to below 1.
        progress: show a bar.

    Returns:
        A row for each step: ``template`` and ``corruption``, or the first group (``group`` if there is none); ``step``,
        ``layer`` (restored at this step; -1 at step 0),
        ``accuracy``, ``low`` and ``high`` (its bootstrap 95 % interval), ``probability`` (mean, of the answer among
        the pair's candidates), ``n`` (rows). ``meta["unreached"]`` lists the kinds, such as [template, corruption],
        whose accuracy stays at or below the target even with every layer restored.

    Raises:
        ValueError: if the model is no Mamba, the data are empty, or the target is not from 0 to below 1.
    """
    model.require_mamba("cross-talk sets")
    check_data(model, data)
    accuracy = real_number(target)
    if accuracy is None or not 0 <= accuracy < 1:
        raise ValueError(f"target is an accuracy to exceed, from 0 to below 1, not {target!r}")
    target = accuracy
    names, kinds = rows_by_group(data, COLUMNS, names=("template", "corruption"))
    steps, unreached = [], []
    for kind, rows in tqdm(kinds.items(), desc="cross-talk", disable=not progress):
        found = _restore_layers(model, data[rows], target)
        steps += [dict(zip(names, kind, strict=True)) | step for step in found]
        if found[-1]["accuracy"] <= target:
            unreached.append(list(kind))
    if unreached:
        logger.warning("%d of %d kinds of prompts stay at accuracy %g or below", len(unreached), len(kinds), target)
    arguments = {"target": target, "rows": len(data)}
    return Result.create(
        "cross_talk", pd.DataFrame(steps), model=model, arguments=arguments, kind=names, unreached=unreached
    )


def _restore_layers(model: MambaModel, data: PromptPairs, target: float) -> list[dict]:
    """The steps for the rows of one kind of prompt."""
    readout = Readout.of(data)
    moved = {layer: found for layer in range(model.n_layers) if (found := between_tokens(model, layer))}
    resampled = list(moved)
    steps: list[dict] = []
    restored, choices = -1, [resampled]
    while True:
        interventions = [[Resample(site, layer) for layer in choice for site in moved[layer]] for choice in choices]
        logits = sweep(model, data.clean_tokens, interventions, readout, source=data.corrupt_tokens)
        accuracies, probabilities = candidate_scores(logits, readout)
        best = best_run(accuracies, probabilities)
        if steps:
            restored = resampled[best]
            resampled = choices[best]
        accuracy, low, high = (float(value) for value in mean_with_interval(accuracies[best]))
        score = {"accuracy": accuracy, "low": low, "high": high, "probability": float(probabilities[best].mean())}
        steps.append({"step": len(steps), "layer": restored, **score, "n": len(data)})
        if accuracy > target or not resampled:
            return steps
        choices = [[other for other in resampled if other != layer] for layer in resampled]


def between_tokens(model: MambaModel, layer: int) -> list[str]:
    """The sites at which a layer reads what it moves between tokens; none if it moves nothing."""
    sites = model.sites_of(layer)
    if "attention" in model.layer_kinds[layer].split("+") and "attn_in" not in sites:
        return ["layer_input"]  # what a shared block's attention moved before the mixer reads it
    return [site for site in ("in_proj", "attn_in") if site in sites]
