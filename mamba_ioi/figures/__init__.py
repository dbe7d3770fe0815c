"""Figures of the paper: each a function from a Result to a matplotlib Figure; none touches a model."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

from mamba_ioi.catalogue import drawers
from mamba_ioi.figures.architecture import architecture
from mamba_ioi.figures.circuit_graph import circuit_graph
from mamba_ioi.figures.circuit_html import circuit_html
from mamba_ioi.figures.circuit_matrices import circuit_matrices, edge_scores, layer_parts
from mamba_ioi.figures.circuit_tables import circuit_tables
from mamba_ioi.figures.companions import save_companions
from mamba_ioi.figures.conv_slices import conv_slices
from mamba_ioi.figures.cross_talk import cross_talk
from mamba_ioi.figures.diagram import ModelSizes
from mamba_ioi.figures.direct_effects import direct_effects
from mamba_ioi.figures.faithfulness import faithfulness
from mamba_ioi.figures.features import feature_edges, feature_effects, feature_faithfulness
from mamba_ioi.figures.intervals import intervals
from mamba_ioi.figures.knockout import knockout
from mamba_ioi.figures.last_position import last_position_only
from mamba_ioi.figures.layer_removal import greedy_layer_removal, layer_removal
from mamba_ioi.figures.logit_lens import logit_lens
from mamba_ioi.figures.name_steering import name_pca, name_steering
from mamba_ioi.figures.probe import probe
from mamba_ioi.figures.resample_ablation import resample_ablation
from mamba_ioi.figures.residual_graph import residual_edges, residual_graph
from mamba_ioi.figures.ssm_internals import ssm_internals
from mamba_ioi.figures.state_similarity import state_similarity
from mamba_ioi.figures.style import save_figure
from mamba_ioi.figures.token_flow import token_flow

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
    "direct_effects",
    "draw",
    "edge_scores",
    "faithfulness",
    "feature_edges",
    "feature_effects",
    "feature_faithfulness",
    "greedy_layer_removal",
    "intervals",
    "knockout",
    "last_position_only",
    "layer_parts",
    "layer_removal",
    "logit_lens",
    "name_pca",
    "name_steering",
    "probe",
    "resample_ablation",
    "residual_edges",
    "residual_graph",
    "save_companions",
    "save_figure",
    "ssm_internals",
    "state_similarity",
    "token_flow",
]


FIGURES: dict[str, Callable[[Result], Figure]] = {name: resolve_name(path) for name, path in drawers().items()}
"""From an experiment's name, `meta["experiment"]`, to the function that draws its Result: a view of the catalogue."""


def draw(result: Result) -> Figure:
    """The figure of a result, chosen by `result.meta["experiment"]`.

    Raises:
        ValueError: no figure is known for that experiment, or the table lacks a column that its figure needs.
    """
    return result.plot()
