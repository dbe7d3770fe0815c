"""`bottleneck`: the one layer that what other layers know of the answer passes through."""

from __future__ import annotations

import torch

from ..interventions.patch import Resample
from ..models.model import MambaModel
from ..tasks import generate
from ..tasks.pairs import Metric, PromptPairs
from .common import check_data, resample_effects, rows_by_group

DEFAULT_PAIRS = 40


def bottleneck(model: MambaModel, data: PromptPairs, *, metric: Metric | None = None, progress: bool = False) -> int:
    """The layer that matters most by resample ablation, layer 0 set aside (39 in mamba-370m, paper, Section 4.1).

    Each layer's ``layer_input`` is resampled at all positions at once. The layer with the largest effect is the
    bottleneck: the mean over the first group's labels (corruptions) of the median over a label's rows of 1 - NLD. The
    median, because NLD divides by each row's own range, and a row that clean and corrupt run answer alike would
    outweigh all others. Layer 0 is set aside because it does the embedding's work and matters to everything.

    Args:
        model: a Mamba of at least two layers.
        data: pairs of prompts; they need not be aligned.
        metric: what effects are of, as in `resample_ablation`; the pairs' own if None.
        progress: show a bar.

    Raises:
        ValueError: if the model is no Mamba, has one layer only, or the data are empty.
    """
    model.require_mamba("bottleneck layers")
    check_data(model, data)
    if model.n_layers < 2:
        raise ValueError("a bottleneck other than layer 0 needs a model of at least 2 layers, not 1")
    layers = range(1, model.n_layers)
    effects = resample_effects(
        model,
        data,
        [[Resample("layer_input", layer)] for layer in layers],
        metric=metric,
        description="bottleneck" if progress else None,
    )
    typical = [effects[:, rows].median(1).values for rows in rows_by_group(data)[1].values()]
    return layers[int(torch.stack(typical).sum(0).argmax())]


def default_layer(model: MambaModel, *, seed: int, progress: bool = False) -> int:
    """The bottleneck on a few of the paper's pairs, for experiments that are given no data."""
    return bottleneck(model, default_pairs(model, seed), progress=progress)


def default_pairs(model: MambaModel, seed: int) -> PromptPairs:
    """The paper's pairs that the bottleneck is found on where no others are given: 40 of all templates, both ways."""
    return generate("ioi", model.tokenizer, 2 * DEFAULT_PAIRS, seed=seed, templates="all", symmetric=True)
