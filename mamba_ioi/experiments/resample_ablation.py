"""Figures 4, 10 and 11: resample one site at one layer and position, and see how far the answer follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..interventions.attribution import attributed_effects
from ..interventions.patch import Resample
from ..interventions.readout import Readout
from ..models.model import CausalLM
from ..result import Result
from ..tasks.pairs import Metric, PromptPairs, check_metric, metric_name
from ..trace.blocks import EVERY_SITE
from ..trace.sites import SITES
from .common import check_data, check_layers, check_places, mean_where, present, resample_effects, rows_by_group, where
from .labels import token_labels

MEASURED_CELLS, MEASURED_ROWS = 128, 8
"""How much of an estimated map is measured as well, at most."""


def resample_ablation(
    model: CausalLM,
    data: PromptPairs,
    site: str = "layer_input",
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    *,
    marks: Sequence[str] | str | None = None,
    metric: Metric | None = None,
    estimate: Literal["attribution"] | None = None,
    progress: bool = True,
) -> Result:
    """Put the corrupt prompt's activation in place of the clean one at each layer and position in turn.

    The effect is 1 - NLD, without the absolute value: 0 where the model still answers as to the clean prompt, 1
    where it answers as to the corrupt one (paper, Section 4.1; Figure 4 is ``layer_input``, Figure 10 ``h``, Figure
    11 ``out_proj``). A resampled state ``h`` is carried on: later states follow from it.

    Args:
        model: any causal language model.
        data: pairs of prompts; aligned ones, unless ``marks`` are given.
        site: any site of a layer that has positions; `sites_of` names those of a model without scans.
        layers: which layers; all that have the site if None.
        positions: which positions, counted from 0; all if None.
        marks: instead of positions, names of positions in each row: marks of the data, ``last``, or so many tokens
            after or before one, ``n1+1``. Each row is patched at its own position.
        metric: what is measured; the pairs' own if None. Under ``nld`` the effect is 1 - NLD; under another metric
            it is what the metric loses, clean run less patched run.
        estimate: None measures each cell; ``"attribution"`` estimates all of them from one forward and backward pass
            (attribution patching, arXiv 2310.10348) and measures some, to say how far the estimate can be trusted.
        progress: show a bar.

    Returns:
        A row for each label of the data's first group (its name is the column's: ``corruption``; ``group`` if there is
        none), layer and position: ``label`` (see `token_labels`), ``effect`` (mean over the rows), ``low`` and ``high``
        (its bootstrap 95 % interval), ``n`` (rows). By marks, the column ``mark`` takes the place of ``position`` and
        ``label``, and rows without the mark are left out: ``n`` counts the others, and where there are none the effect
        is NaN.
        Of an estimate, ``meta["rank_correlation"]`` is Spearman's with the measured effects (means over rows) on
        ``meta["measured_cells"]`` cells and ``meta["measured_rows"]`` rows, spread evenly over the map and the data.

    Raises:
        ValueError: if the data are empty or not aligned, a site, layer or position is not there, a mark is unknown, or
            the kind of estimate is.
    """
    there = [model.sites_of(layer) for layer in range(model.n_layers)]
    known = dict.fromkeys(name for names in there for name in names)
    usable = [name for name in known if EVERY_SITE[name].by_position]
    if site not in usable:
        if not model.has_scans and isinstance(site, str) and site in SITES and SITES[site].owner != "model":
            model.require_site(site, 0)
        raise ValueError(f"site {site!r} has no layers and positions to go through; use one of {', '.join(usable)}")
    check_data(model, data, aligned="resample_ablation" if marks is None else None)
    if layers is None:
        layers = [layer for layer, names in enumerate(there) if site in names]
    layers, places = check_layers(model, layers), check_places(data, positions, marks)
    for layer in layers:
        model.require_site(site, layer)
    if estimate not in (None, "attribution"):
        raise ValueError(f"estimate is None or 'attribution', not {estimate!r}")
    metric = check_metric(data, metric)
    if not isinstance(metric, str) and estimate is not None:
        raise ValueError(f"estimates are of metrics by name, and {metric!r} is a callable: measure it, estimate=None")
    cells = list(product(layers, places))
    kind = "positions" if marks is None else "marks"
    arguments = {"site": site, "layers": layers, kind: places, "rows": len(data), "estimate": estimate}
    arguments["metric"] = metric_name(metric)
    description = f"resample {site}" if progress else None
    if estimate is None:
        effects, agreement = _measured(model, data, site, cells, metric, description), {}
    else:
        assert isinstance(metric, str)  # a callable was refused
        readout, source = Readout.of(data), data.corrupt_tokens
        maps = attributed_effects(model, data.clean_tokens, readout, site, layers, source=source, metric=metric)
        rows = torch.arange(len(data))
        at = [torch.full((len(data),), p) if isinstance(p, int) else data.positions_of(p).clamp(min=0) for p in places]
        effects = torch.stack([maps[:, own.cpu(), rows] for own in at], dim=1).flatten(0, 1)
        agreement = _agreement(model, data, site, cells, metric, effects, description)
    columns = place_columns("layer", cells)
    return Result.create(
        "resample_ablation",
        effect_table(model, data, columns, effects),
        model=model,
        arguments=arguments,
        **agreement,
    )


def _measured(
    model: CausalLM,
    data: PromptPairs,
    site: str,
    cells: Sequence[tuple[int, int | str]],
    metric: Metric,
    description: str | None,
) -> Float[Tensor, "I B"]:
    """The effect of resampling each (layer, place) on each row."""
    interventions = [[Resample(site, layer, where(data, place))] for layer, place in cells]
    return resample_effects(model, data, interventions, metric=metric, description=description)


def _agreement(
    model: CausalLM,
    data: PromptPairs,
    site: str,
    cells: Sequence[tuple[int, int | str]],
    metric: Metric,
    effects: Float[Tensor, "I B"],
    description: str | None,
) -> dict[str, Any]:
    """How the estimates rank some cells, beside how they rank when they are measured."""
    some = torch.linspace(0, len(cells) - 1, min(len(cells), MEASURED_CELLS)).round().long()
    rows = torch.linspace(0, len(data) - 1, min(len(data), MEASURED_ROWS)).round().long()
    chosen = [cells[cell] for cell in some.tolist()]
    there = torch.stack([present(data, place)[rows] for _, place in chosen])
    measured = _measured(model, data[rows], site, chosen, metric, description)
    estimated = effects[some][:, rows]
    means = (torch.where(there, values, 0).sum(1) / there.sum(1) for values in (estimated, measured))
    one, other = (pd.Series(values.double().numpy()).rank() for values in means)
    agreement = float(one.corr(other))
    return {
        "rank_correlation": agreement if agreement == agreement else None,  # of cells that do not differ there is none
        "measured_cells": len(some),
        "measured_rows": len(rows),
    }


def place_columns(name: str, cells: Sequence[tuple[int, int | str]]) -> dict[str, list]:
    """The columns of cells (layer or slice, place): a place is a position, or a mark."""
    kind = "mark" if isinstance(cells[0][1], str) else "position"
    return {name: [cell[0] for cell in cells], kind: [cell[1] for cell in cells]}


def effect_table(model: CausalLM, data: PromptPairs, columns: dict[str, list], effects) -> pd.DataFrame:
    """A row for each label of the first group and intervention: its columns, the position's label, and the mean effect.

    Args:
        model: its tokenizer labels the positions.
        data: the rows that ``effects`` [I, B] are of.
        columns: what says which intervention it is, [I] each; one of them is ``position`` or ``mark``.
        effects: [I, B].
    """
    parts = []
    (name,), kinds = rows_by_group(data, (*columns, "label", "effect", "low", "high", "n"))
    places = columns["mark"] if "mark" in columns else columns["position"]
    known = {place: present(data, place) for place in dict.fromkeys(places)}
    there = torch.stack([known[place] for place in places])
    for (value,), rows in kinds.items():
        part = {name: value, **columns}
        if "position" in columns:
            labels = token_labels(data[rows], model.tokenizer, value)
            part["label"] = [labels[position] for position in places]
        mean, low, high = mean_where(effects[:, rows], there[:, rows])
        parts.append(
            pd.DataFrame(part | {"effect": mean, "low": low, "high": high, "n": there[:, rows].sum(1).numpy()})
        )
    return pd.concat(parts, ignore_index=True)
