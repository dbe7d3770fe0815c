"""What is written beside a circuit's figure: its interactive page, its tables, and each layer's own view."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_ioi.figures.circuit_graph import circuit_graph, kept_edges
from mamba_ioi.figures.circuit_html import circuit_html
from mamba_ioi.figures.circuit_layout import default_hidden, drawn_edges, nodes_of
from mamba_ioi.figures.circuit_tables import circuit_tables
from mamba_ioi.figures.style import save_figure
from mamba_ioi.files import replace_files

if TYPE_CHECKING:
    from mamba_ioi.result import Result

GRAPHS = ("positional_circuit",)


def save_companions(result: Result, stem: str | os.PathLike[str]) -> list[Path]:
    """Write what belongs beside a result's figure: nothing but for a positional circuit (App. D.3).

    Of that, `stem`.html, `stem`_tables and one `stem`_layer3 for each layer that is shown when others are hidden, and
    for those hidden, as PNG and PDF.

    Args:
        result: of any experiment.
        stem: path without suffix, as for `save_figure`.

    Returns:
        The files' paths.
    """
    if result.meta["experiment"] not in GRAPHS or result.table.empty:
        return []
    stem = Path(os.path.expanduser(stem))
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.html")]
    replace_files(stem.parent, {paths[0].name: circuit_html(result).encode("utf-8", "backslashreplace")})
    paths += save_figure(circuit_tables(result), stem.with_name(f"{stem.name}_tables"))
    for layer in layers_to_view(result):
        paths += save_figure(circuit_graph(result, layer=layer), stem.with_name(f"{stem.name}_layer{layer}"))
    return paths


def layers_to_view(result: Result) -> list[int]:
    """The layers whose single views tell something: those of the figure, and those hidden in it."""
    table = kept_edges(result)
    hidden = default_hidden(table)
    nodes = {node.replace(" ", ".").split(".")[0] for node in nodes_of(drawn_edges(table, hidden))}
    return sorted(int(node) for node in nodes | set(hidden) if node.isdigit())
