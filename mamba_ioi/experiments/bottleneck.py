"""`bottleneck`: the one layer that what other layers know of the answer passes through."""

from __future__ import annotations

import pandas as pd
import torch

from ..interventions.patch import Resample
from ..models.model import MambaModel
from ..result import Result
from ..tasks import generate
from ..tasks.pairs import Metric, PromptPairs, check_metric, metric_name
from .common import check_data, resample_effects, rows_by_group

DEFAULT_PAIRS = 40


def bottleneck(model: MambaModel, data: PromptPairs, *, metric: Metric | None = None, progress: bool = False) -> int:
    """The layer that matters most by resample ablation, layer 0 set aside (39 in mamba-370m, paper, Section 4.1).

    This is the one definition of it: experiments that look at one layer take it from here, and a folder of
    ``mamba-ioi reproduce`` records it for its figures and its report. See `whole_layer_effects` for what it goes by.

    Args:
        model: a model with scans in at least one layer other than layer 0.
        data: pairs of prompts; they need not be aligned.
        metric: what effects are of, as in `resample_ablation`; the pairs' own if None.
        progress: show a bar.

    Raises:
        ValueError: if the model is no Mamba, has no such layer, or the data are empty.
    """
    return whole_layer_effects(model, data, metric=metric, progress=progress).meta["arguments"]["layer"]


def whole_layer_effects(
    model: MambaModel, data: PromptPairs, *, metric: Metric | None = None, progress: bool = False
) -> Result:
    """What `bottleneck` chooses by: how much each layer's input matters, layer 0 set aside.

    Each layer's ``layer_input`` is resampled at all positions at once. Its effect is the mean over the first group's
    labels (corruptions) of the median over a label's rows of 1 - NLD. The median, because NLD divides by each row's own
    range, and a row that clean and corrupt run answer alike would outweigh all others. Layer 0 is set aside because it
    does the embedding's work and matters to everything.

    Args:
        model: as for `bottleneck`.
        data: likewise.
        metric: likewise.
        progress: likewise.

    Returns:
        A row for each layer with a scan from 1 on: ``layer``, ``effect``. ``meta["arguments"]["layer"]`` is the
        bottleneck: the layer of the largest effect, of several the first.

    Raises:
        ValueError: as `bottleneck`.
    """
    model.require_mamba("bottleneck layers")
    check_data(model, data)
    metric = check_metric(data, metric)
    layers = [layer for layer in range(1, model.n_layers) if "layer_input" in model.layer_sites(layer)]
    if not layers:
        raise ValueError(
            f"a bottleneck is a layer with a scan other than layer 0; {model.model_id} has none among its "
            f"{model.n_layers}"
        )
    effects = resample_effects(
        model,
        data,
        [[Resample("layer_input", layer)] for layer in layers],
        metric=metric,
        description="bottleneck" if progress else None,
    )
    typical = [effects[:, rows].median(1).values for rows in rows_by_group(data)[1].values()]
    means = torch.stack(typical).mean(0)
    arguments = {"layer": layers[int(means.argmax())], "rows": len(data), "metric": metric_name(metric)}
    table = pd.DataFrame({"layer": layers, "effect": means.double().tolist()})
    return Result.create("bottleneck", table, model=model, arguments=arguments)


def default_layer(model: MambaModel, *, seed: int, progress: bool = False) -> int:
    """The bottleneck on a few of the paper's pairs, for experiments that are given no data."""
    return bottleneck(model, default_pairs(model, seed), progress=progress)


def default_pairs(model: MambaModel, seed: int) -> PromptPairs:
    """The paper's pairs that the bottleneck is found on where no others are given: 40 of all templates, both ways."""
    return generate("ioi", model.tokenizer, 2 * DEFAULT_PAIRS, seed=seed, templates="all", symmetric=True)
