"""Figures of the paper: each a function from a Result to a matplotlib Figure; none touches a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.architecture import architecture
from mamba_ioi.figures.circuit_graph import circuit_graph
from mamba_ioi.figures.circuit_html import circuit_html
from mamba_ioi.figures.circuit_matrices import circuit_matrices, edge_scores, layer_parts
from mamba_ioi.figures.circuit_tables import circuit_tables
from mamba_ioi.figures.companions import save_companions
from mamba_ioi.figures.conv_slices import conv_slices
from mamba_ioi.figures.cross_talk import cross_talk
from mamba_ioi.figures.diagram import ModelSizes
from mamba_ioi.figures.faithfulness import faithfulness
from mamba_ioi.figures.last_position import last_position_only
from mamba_ioi.figures.layer_removal import greedy_layer_removal, layer_removal
from mamba_ioi.figures.name_steering import name_pca, name_steering
from mamba_ioi.figures.resample_ablation import resample_ablation
from mamba_ioi.figures.residual_graph import residual_edges, residual_graph
from mamba_ioi.figures.ssm_internals import ssm_internals
from mamba_ioi.figures.state_similarity import state_similarity
from mamba_ioi.figures.style import require, save_figure

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

__all__ = [
    "FIGURES",
    "ModelSizes",
    "architecture",
    "circuit_graph",
    "circuit_html",
    "circuit_matrices",
    "circuit_tables",
    "conv_slices",
    "cross_talk",
    "draw",
    "edge_scores",
    "faithfulness",
    "greedy_layer_removal",
    "last_position_only",
    "layer_parts",
    "layer_removal",
    "name_pca",
    "name_steering",
    "resample_ablation",
    "residual_edges",
    "residual_graph",
    "save_companions",
    "save_figure",
    "ssm_internals",
    "state_similarity",
]


def _architecture(result: Result) -> Figure:
    return architecture(ModelSizes.of_result(result), model=result.meta.get("model"))


def _ssm_internals(result: Result) -> Figure:
    return ssm_internals(ModelSizes.of_result(result), model=result.meta.get("model"))


def _residual_graph(result: Result) -> Figure:
    require(result, "src", "dst")
    return residual_graph(result.table["dst"].nunique() - 1)


FIGURES: dict[str, Callable[[Result], Figure]] = {
    "architecture": _architecture,
    "residual_graph": _residual_graph,
    "resample_ablation": resample_ablation,
    "layer_removal": layer_removal,
    "greedy_layer_removal": greedy_layer_removal,
    "cross_talk": cross_talk,
    "state_similarity": state_similarity,
    "conv_slices": conv_slices,
    "name_steering": name_steering,
    "name_pca": name_pca,
    "ssm_internals": _ssm_internals,
    "eap": edge_scores,
    "exact_effects": edge_scores,
    "faithfulness": faithfulness,
    "edge_matrices": circuit_matrices,
    "layer_parts": layer_parts,
    "positional_circuit": circuit_graph,
    "last_position_only": last_position_only,
}
"""From an experiment's name, `meta["experiment"]`, to the function that draws its Result."""


def draw(result: Result) -> Figure:
    """The figure of a result, chosen by `result.meta["experiment"]`.

    Raises:
        ValueError: no figure is known for that experiment, or the table lacks a column that its figure needs.
    """
    experiment = result.meta["experiment"]
    if experiment not in FIGURES:
        raise ValueError(f"no figure is known for the experiment {experiment!r}; there are {', '.join(FIGURES)}")
    return FIGURES[experiment](result)
