"""Figures 4, 10 and 11: resample one site at one layer and position, and see how far the answer follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd

from ..dataset import IOIDataset
from ..model import MambaModel
from ..result import Result
from ..sites import SITES
from ..sweep import Resample
from .common import (
    check_data,
    check_layers,
    check_positions,
    corruptions_of,
    mean_with_interval,
    resample_effects,
    rows_of,
)
from .labels import token_labels


def resample_ablation(
    model: MambaModel,
    data: IOIDataset,
    site: str = "layer_input",
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    *,
    progress: bool = True,
) -> Result:
    """Put the corrupt prompt's activation in place of the clean one at each layer and position in turn.

    The effect is 1 - NLD, without the absolute value: 0 where the model still answers as to the clean prompt, 1
    where it answers as to the corrupt one (paper, Section 4.1; Figure 4 is ``layer_input``, Figure 10 ``h``, Figure
    11 ``out_proj``). A resampled state ``h`` is carried on: later states follow from it.

    Args:
        model: a Mamba.
        data: aligned prompts.
        site: any site of a layer that has positions.
        layers: which layers; all if None.
        positions: which positions, counted from 0; all if None.
        progress: show a bar.

    Returns:
        A row for each corruption, layer and position: ``label`` (see `token_labels`), ``effect`` (mean over the
        corruption's rows), ``low`` and ``high`` (its bootstrap 95 % interval), ``n`` (rows).

    Raises:
        ValueError: if the model is no Mamba, the data are empty or not aligned, or a site, layer or position is not
            there.
    """
    model.require_mamba("resample ablations of sites")
    check_data(data, aligned="resample_ablation")
    info = SITES.get(site)
    if info is None or info.owner == "model" or not info.by_position:
        usable = [name for name, other in SITES.items() if other.owner != "model" and other.by_position]
        raise ValueError(f"site {site!r} has no layers and positions to go through; use one of {', '.join(usable)}")
    layers, positions = check_layers(model, layers), check_positions(data, positions)
    cells = list(product(layers, positions))
    effects = resample_effects(
        model,
        data,
        [[Resample(site, layer, position)] for layer, position in cells],
        description=f"resample {site}" if progress else None,
    )
    arguments = {"site": site, "layers": layers, "positions": positions, "rows": len(data)}
    grid = np.array(cells)
    columns = {"layer": grid[:, 0], "position": grid[:, 1]}
    return Result.create(
        "resample_ablation",
        effect_table(model, data, columns, effects),
        model=model,
        arguments=arguments,
    )


def effect_table(model: MambaModel, data: IOIDataset, columns: dict[str, np.ndarray], effects) -> pd.DataFrame:
    """A row for each corruption and intervention: its columns, the position's label, and the mean effect.

    Args:
        model: its tokenizer labels the positions.
        data: the rows that ``effects`` [I, B] are of.
        columns: what says which intervention it is, [I] each; one of them is ``position``.
        effects: [I, B].
    """
    parts = []
    for corruption in corruptions_of(data):
        rows = rows_of(data.corruptions, corruption)
        labels = token_labels(data[rows], model.tokenizer, corruption)
        mean, low, high = mean_with_interval(effects[:, rows])
        part = {"corruption": corruption, **columns, "label": [labels[position] for position in columns["position"]]}
        parts.append(pd.DataFrame(part | {"effect": mean, "low": low, "high": high, "n": len(rows)}))
    return pd.concat(parts, ignore_index=True)
