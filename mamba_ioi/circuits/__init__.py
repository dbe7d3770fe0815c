"""Circuits: edge patching, attribution, search and pruning, with positions and inside layers (paper, § 3, § 5, App. D).

Nodes are ``embed``, ``0`` … ``n-1``, ``output``; fine ones ``39.conv[-1]``, ``39.conv``, ``39.ssm``, ``39.skip`` (see
`graph`). An edge is ``(src, dst)`` or ``(src, dst, position)``. A more negative score marks an edge more needed.
"""

from .acdc import acdc
from .circuit import Circuit
from .eap import eap
from .effects import exact_effects, overlap, rank_correlation
from .evaluate import Evaluation, evaluate, faithfulness, last_position_only
from .export import layer_view, to_dot, to_mib
from .graph import Graph
from .search import minimal_circuit, top_k
from .token_edges import token_edges
from .token_flow import token_flow

__all__ = [
    "Circuit",
    "Evaluation",
    "Graph",
    "acdc",
    "eap",
    "evaluate",
    "exact_effects",
    "faithfulness",
    "last_position_only",
    "layer_view",
    "minimal_circuit",
    "overlap",
    "rank_correlation",
    "to_dot",
    "to_mib",
    "token_edges",
    "token_flow",
    "top_k",
]
