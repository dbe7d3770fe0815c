"""Figures of the paper: each a function from a Result to a matplotlib Figure; none touches a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.conv_slices import conv_slices
from mamba_ioi.figures.cross_talk import cross_talk
from mamba_ioi.figures.layer_removal import greedy_layer_removal, layer_removal
from mamba_ioi.figures.name_steering import name_pca, name_steering
from mamba_ioi.figures.resample_ablation import resample_ablation
from mamba_ioi.figures.state_similarity import state_similarity
from mamba_ioi.figures.style import save_figure

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

FIGURES: dict[str, Callable[[Result], Figure]] = {
    "resample_ablation": resample_ablation,
    "layer_removal": layer_removal,
    "greedy_layer_removal": greedy_layer_removal,
    "cross_talk": cross_talk,
    "state_similarity": state_similarity,
    "conv_slices": conv_slices,
    "name_steering": name_steering,
    "name_pca": name_pca,
}
"""From an experiment's name, `meta["experiment"]`, to the function that draws it."""

__all__ = ["FIGURES", "draw", "save_figure", *FIGURES]


def draw(result: Result) -> Figure:
    """The figure of a result, chosen by `result.meta["experiment"]`.

    Raises:
        ValueError: no figure is known for that experiment.
    """
    experiment = result.meta["experiment"]
    if experiment not in FIGURES:
        raise ValueError(f"no figure is known for the experiment {experiment!r}; there are {', '.join(FIGURES)}")
    return FIGURES[experiment](result)
