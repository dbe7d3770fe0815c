"""Figure 8: resample one tap of a layer's convolution at one output position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from ..checks import integer, integers, listed
from ..interventions.patch import Resample, some_channels
from ..models.model import MambaModel
from ..result import Result
from ..tasks.pairs import Metric, PromptPairs, check_metric, metric_name
from .bottleneck import bottleneck
from .common import check_data, check_layer, check_places, resample_effects, where
from .resample_ablation import effect_table, place_columns


def conv_slices(
    model: MambaModel,
    data: PromptPairs,
    layer: int | None = None,
    slices: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    *,
    marks: Sequence[str] | str | None = None,
    channels: str | None = None,
    metric: Metric | None = None,
    progress: bool = True,
) -> Result:
    """Put the corrupt prompt's term in place of one term of the convolution's sum, at each output position in turn.

    The conv's output at position p is its bias and a term for each slice s, weight[:, s] * in_proj[p + s]. A large
    effect of slice s at output position p says that the layer's SSM takes what it needs at p from the token at
    p + s (paper, Section 4.2 and Figure 8). In a Mamba-2 the SSM's B and C pass through the conv beside its input x,
    and ``channels`` tells them apart.

    Args:
        model: a Mamba.
        data: pairs of prompts; aligned ones, unless ``marks`` are given.
        layer: the layer; the model's bottleneck on these data if None.
        slices: taps of the conv, 0 (the position itself) down to 1 - d_conv; all if None.
        positions: output positions, counted from 0; all if None.
        marks: instead of positions, names of output positions in each row, as in `resample_ablation`.
        channels: of a Mamba-2 the channels whose terms are resampled: ``"x"``, ``"B"`` or ``"C"``; all if None.
        metric: what is measured; the pairs' own if None. Under ``nld`` the effect is 1 - NLD; under another metric
            it is what the metric loses, clean run less patched run.
        progress: show a bar.

    Returns:
        A row for each label of the data's first group (``corruption``; ``group`` if there is none), slice and output
        position: ``label`` (of the output position), ``effect`` (mean 1 - NLD, not absolute),
        ``low`` and ``high`` (its bootstrap 95 % interval), ``n`` (rows). By marks, as in
        `resample_ablation`.

    Raises:
        ValueError: if the model is no Mamba, the data are empty or not aligned, or a layer, slice or position is not
            there; for ``channels`` of a model whose conv has those of x alone.
    """
    model.require_mamba("conv slices")
    check_data(model, data, aligned="conv_slices" if marks is None else None)
    taps = range(1 - model.d_conv, 1)
    slices = list(taps) if slices is None else slices
    named = [integer(tap) for tap in listed(slices)]
    if not named or any(tap not in taps for tap in named) or len(set(named)) < len(named):
        raise ValueError(f"slices are among {list(taps)}, each once, not {slices}")
    slices = integers(slices, "slice")
    places = check_places(data, positions, marks)
    if channels is not None:
        some_channels(model, model.known_sites()["conv_slice"], channels)
    metric = check_metric(data, metric)
    layer = bottleneck(model, data, metric=metric, progress=progress) if layer is None else check_layer(model, layer)
    cells = list(product(slices, places))
    effects = resample_effects(
        model,
        data,
        [[Resample("conv_slice", layer, where(data, place), tap, channels)] for tap, place in cells],
        metric=metric,
        description=f"conv slices of layer {layer}" if progress else None,
    )
    columns = place_columns("slice", cells)
    kind = "positions" if marks is None else "marks"
    arguments = {"layer": layer, "slices": slices, kind: places, "rows": len(data)}
    arguments |= {"channels": channels, "metric": metric_name(metric)}
    return Result.create("conv_slices", effect_table(model, data, columns, effects), model=model, arguments=arguments)
