"""Figures 4, 10 and 11: resample one site at one layer and position, and see how far the answer follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import attributed_effects
from ..blocks import EVERY_SITE
from ..model import MambaModel
from ..result import Result
from ..sites import SITES
from ..sweep import Readout, Resample
from ..tasks.pairs import PromptPairs
from .common import (
    check_data,
    check_layers,
    check_positions,
    mean_with_interval,
    resample_effects,
    rows_by_group,
)
from .labels import token_labels

MEASURED_CELLS, MEASURED_ROWS = 128, 8
"""How much of an estimated map is measured as well, at most."""


def resample_ablation(
    model: MambaModel,
    data: PromptPairs,
    site: str = "layer_input",
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    *,
    estimate: Literal["attribution"] | None = None,
    progress: bool = True,
) -> Result:
    """Put the corrupt prompt's activation in place of the clean one at each layer and position in turn.

    The effect is 1 - NLD, without the absolute value: 0 where the model still answers as to the clean prompt, 1
    where it answers as to the corrupt one (paper, Section 4.1; Figure 4 is ``layer_input``, Figure 10 ``h``, Figure
    11 ``out_proj``). A resampled state ``h`` is carried on: later states follow from it.

    Args:
        model: any causal language model.
        data: aligned pairs of prompts.
        site: any site of a layer that has positions; `sites_of` names those of a model without scans.
        layers: which layers; all if None.
        positions: which positions, counted from 0; all if None.
        estimate: None measures each cell; ``"attribution"`` estimates all of them from one forward and backward pass
            (attribution patching, arXiv 2310.10348) and measures some, to say how far the estimate can be trusted.
        progress: show a bar.

    Returns:
        A row for each label of the data's first group (its name is the column's: ``corruption``; ``group`` if there is
        none), layer and position: ``label`` (see `token_labels`), ``effect`` (mean over the rows), ``low`` and ``high``
        (its bootstrap 95 % interval), ``n`` (rows).
        Of an estimate, ``meta["rank_correlation"]`` is Spearman's with the measured effects (means over rows) on
        ``meta["measured_cells"]`` cells and ``meta["measured_rows"]`` rows, spread evenly over the map and the data.

    Raises:
        ValueError: if the data are empty or not aligned, a site, layer or position is not
            there, or the kind of estimate is unknown.
    """
    usable = [name for name in model.sites_of(0) if EVERY_SITE[name].by_position]
    if site not in usable:
        if not model.has_scans and isinstance(site, str) and site in SITES and SITES[site].owner != "model":
            model.require_site(site, 0)
        raise ValueError(f"site {site!r} has no layers and positions to go through; use one of {', '.join(usable)}")
    check_data(model, data, aligned="resample_ablation")
    layers, positions = check_layers(model, layers), check_positions(data, positions)
    if estimate not in (None, "attribution"):
        raise ValueError(f"estimate is None or 'attribution', not {estimate!r}")
    cells = list(product(layers, positions))
    arguments = {"site": site, "layers": layers, "positions": positions, "rows": len(data), "estimate": estimate}
    description = f"resample {site}" if progress else None
    if estimate is None:
        effects, agreement = _measured(model, data, site, cells, description), {}
    else:
        maps = attributed_effects(model, data.clean_tokens, Readout.of(data), site, layers, source=data.corrupt_tokens)
        effects = maps[:, positions].flatten(0, 1)
        agreement = _agreement(model, data, site, cells, effects, description)
    grid = np.array(cells)
    columns = {"layer": grid[:, 0], "position": grid[:, 1]}
    return Result.create(
        "resample_ablation",
        effect_table(model, data, columns, effects),
        model=model,
        arguments=arguments,
        **agreement,
    )


def _measured(
    model: MambaModel, data: PromptPairs, site: str, cells: Sequence[tuple[int, int]], description: str | None
) -> Float[Tensor, "I B"]:
    """The effect of resampling each (layer, position) on each row."""
    interventions = [[Resample(site, layer, position)] for layer, position in cells]
    return resample_effects(model, data, interventions, description=description)


def _agreement(
    model: MambaModel,
    data: PromptPairs,
    site: str,
    cells: Sequence[tuple[int, int]],
    effects: Float[Tensor, "I B"],
    description: str | None,
) -> dict[str, Any]:
    """How the estimates rank some cells, beside how they rank when they are measured."""
    some = torch.linspace(0, len(cells) - 1, min(len(cells), MEASURED_CELLS)).round().long()
    rows = torch.linspace(0, len(data) - 1, min(len(data), MEASURED_ROWS)).round().long()
    measured = _measured(model, data[rows], site, [cells[cell] for cell in some.tolist()], description).mean(1)
    estimated = effects[some][:, rows].mean(1)
    one, other = (pd.Series(values.double().numpy()).rank() for values in (estimated, measured))
    return {
        "rank_correlation": float(one.corr(other)),
        "measured_cells": len(some),
        "measured_rows": len(rows),
    }


def effect_table(model: MambaModel, data: PromptPairs, columns: dict[str, np.ndarray], effects) -> pd.DataFrame:
    """A row for each label of the first group and intervention: its columns, the position's label, and the mean effect.

    Args:
        model: its tokenizer labels the positions.
        data: the rows that ``effects`` [I, B] are of.
        columns: what says which intervention it is, [I] each; one of them is ``position``.
        effects: [I, B].
    """
    parts = []
    (name,), kinds = rows_by_group(data, (*columns, "label", "effect", "low", "high", "n"))
    for (value,), rows in kinds.items():
        labels = token_labels(data[rows], model.tokenizer, value)
        mean, low, high = mean_with_interval(effects[:, rows])
        part = {name: value, **columns, "label": [labels[position] for position in columns["position"]]}
        parts.append(pd.DataFrame(part | {"effect": mean, "low": low, "high": high, "n": len(rows)}))
    return pd.concat(parts, ignore_index=True)
