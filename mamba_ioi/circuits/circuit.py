"""Circuit: the edges that are kept, how well they do the task, and how the two were found."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..checks import integer
from ..files import replace_files
from ..result import jsonable
from .graph import TAPS, Edge, Graph, Parts, describe, layer_of

FORMAT = "mamba_ioi.circuit"
FORMAT_VERSION = 2


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges of a model's graph. Every edge outside it is resampled when it is run.

    Attributes:
        edges: ``(src, dst)``, or ``(src, dst, position)`` each, in the graph's order.
        n_layers: how many layers the model has.
        fine: whether the circuit says which edges are kept inside layers; if not, all of them are.
        length: the number of positions, if edges are kept apart by position.
        accuracy: on the data the circuit was found on; None if it was not measured.
        nld: mean normalized logit difference there; None likewise.
        table: one row an edge: src, dst, position where there is one, and what the search found out (`score` of EAP;
            `kept` and `effect` of ACDC, which also lists the edges that were dropped).
        meta: how the circuit was found.
        ssm: what a fine circuit's edges conv -> ssm carry, ``conv`` or ``states``, or ``tokens`` (see `Graph`).
        direct_step: whether the layers' time steps come from their inputs and not out of their convs (see `Graph`).
        taps: how many taps the layers' convs have.
        parts: whether blocks are split into mixer, attention and MLP, or the parts of each (see `Graph`).
        mixed_input: whether mixers read what comes into their layers at earlier positions too (see `Graph`).

    Raises:
        ValueError: if an edge is not in the graph, or ``ssm`` is neither.
    """

    edges: tuple[Edge, ...]
    n_layers: int
    fine: bool = False
    length: int | None = None
    accuracy: float | None = None
    nld: float | None = None
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    meta: dict[str, Any] = field(default_factory=dict)
    ssm: str = "conv"
    direct_step: bool = False
    taps: int = TAPS
    parts: bool | tuple[Parts, ...] = False
    mixed_input: bool = False

    def __post_init__(self) -> None:
        graph = self.graph
        object.__setattr__(self, "n_layers", graph.n_layers)
        object.__setattr__(self, "length", graph.length)
        object.__setattr__(self, "parts", graph.parts)
        object.__setattr__(self, "edges", graph.edges(graph.mask(self.edges)))
        if self.table.empty:
            object.__setattr__(self, "table", edge_table(self.edges))

    @classmethod
    def of(cls, model, edges: Iterable[Edge], **known) -> Circuit:
        """A circuit of this model with these edges, such as ``[("embed", "3"), ("3", "output")]``.

        It is fine if an inner edge is among them, of parts if one of these is, and positional if they have positions
        (``length`` says how many there are; else the largest is the last).
        """
        edges = list(edges)
        graph = Graph.of(model.n_layers, edges).on(model)
        known = {"fine": graph.fine, "length": graph.length, **graph.inner_kind, **known}
        return cls(tuple(edges), model.n_layers, **known)

    @property
    def graph(self) -> Graph:
        """The graph that the edges are from."""
        inner = self.ssm, self.direct_step, self.taps, self.parts, self.mixed_input
        return Graph(self.n_layers, self.fine, self.length, *inner)

    def __len__(self) -> int:
        return len(self.edges)

    def __contains__(self, edge: object) -> bool:
        return edge in self.edges

    def __repr__(self) -> str:
        numbers = "" if self.nld is None else f", nld {self.nld:.3f}, accuracy {self.accuracy:.3f}"
        shown = describe(self.edges[:4]) + (", …" if len(self) > 4 else "")
        return f"Circuit({len(self)} of {len(self.graph)} edges{numbers}: {shown})"

    def pruned(self) -> Circuit:
        """The circuit without edges that lie on no path from embed to output; they change no run."""
        graph = self.graph
        return self._with(graph.edges(graph.prune(graph.mask(self.edges))))

    def on_paths(self) -> Circuit:
        """The circuit's edges that lie on a path of kept edges from embed to output, as the authors prune.

        Those of `pruned`, but for slices whose conv -> ssm is cut where ``ssm`` is ``states``: they still reach the
        output through C and D x, along no edge.
        """
        graph = replace(self.graph, ssm="conv")
        return self._with(graph.edges(graph.prune(graph.mask(self.edges))))

    def without(self, edges: Iterable[Edge]) -> Circuit:
        """The circuit without these edges; ``(src, dst)`` takes all positions of an edge away."""
        graph = self.graph
        return self._with(graph.edges(graph.mask(self.edges) & ~graph.mask(edges)))

    def only_last_position(self, layer: int) -> Circuit:
        """The circuit without the edges that leave ``layer``, but for those at the last position (paper, § 4.4).

        Raises:
            ValueError: if edges are not kept apart by position, or there is no such layer.
        """
        if self.length is None:
            raise ValueError("this circuit has no positions; find one with eap(..., positional=True)")
        if integer(layer) not in range(self.n_layers):
            raise ValueError(f"layers are 0 to {self.n_layers - 1}, not {layer}")
        leaving = [edge for edge in self.edges if layer_of(edge[0]) == integer(layer) != layer_of(edge[1])]
        return self.without(edge for edge in leaving if edge[-1] != self.length - 1)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the circuit as JSON; the file is complete before it takes its name."""
        path = Path(os.path.expanduser(path))
        stored = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "n_layers": self.n_layers,
            "fine": self.fine,
            "length": self.length,
            "ssm": self.ssm,
            "direct_step": self.direct_step,
            "taps": self.taps,
            "parts": self.parts,
            "mixed_input": self.mixed_input,
            "accuracy": self.accuracy,
            "nld": self.nld,
            "edges": [list(edge) for edge in self.edges],
            "table": {name: [_plain(value) for value in column] for name, column in self.table.items()},
            "meta": self.meta,
        }
        text = json.dumps(stored, ensure_ascii=False, allow_nan=False, default=jsonable)
        replace_files(path.parent, {path.name: text.encode("utf-8", "backslashreplace")})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read a circuit that `save` wrote.

        Raises:
            ValueError: if the file is missing, is no circuit, or has a version that this release does not read.
        """
        path = Path(os.path.expanduser(path))
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not readable as JSON: {error}") from error
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise ValueError(f"{path} is no circuit: its 'format' is not {FORMAT!r}")
        if stored.get("format_version") not in (1, FORMAT_VERSION):
            raise ValueError(
                f"{path} has format version {stored.get('format_version')!r}; this release reads up to {FORMAT_VERSION}"
            )
        try:
            return cls(
                edges=tuple(tuple(edge) for edge in stored["edges"]),
                n_layers=stored["n_layers"],
                fine=stored["fine"],
                length=stored["length"],
                accuracy=stored["accuracy"],
                nld=stored["nld"],
                table=_frame(stored["table"]),
                meta=stored["meta"],
                ssm=stored["ssm"] if stored["format_version"] > 1 else "conv",
                direct_step=stored.get("direct_step", False),
                taps=stored.get("taps", TAPS),
                parts=stored.get("parts", False),
                mixed_input=stored.get("mixed_input", False),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no complete circuit: {error}") from error

    def _with(self, edges: tuple[Edge, ...]) -> Circuit:
        return replace(self, edges=edges, accuracy=None, nld=None, table=pd.DataFrame(), meta=dict(self.meta))


def edge_table(edges: Iterable[Edge]) -> pd.DataFrame:
    """The edges as a table: src, dst, position (-1 where an edge has none)."""
    rows = [(edge[0], edge[1], edge[2] if len(edge) == 3 else -1) for edge in edges]
    return pd.DataFrame(rows, columns=["src", "dst", "position"])


def _frame(columns: dict[str, list]) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    for name in ("score", "effect"):
        if name in frame:
            frame[name] = frame[name].astype(float)
    return frame


def _plain(value: Any) -> Any:
    """A table's value as JSON holds it; NaN as null."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value
