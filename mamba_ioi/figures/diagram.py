"""Parts of block diagrams, in inches: boxes, arrows that end at them, and named hook points on the arrows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from mamba_ioi.figures.style import GREY, VERMILION, new_figure, require

if TYPE_CHECKING:
    from mamba_ioi.result import Result

FILLS = {
    "learned": "#D6E6F4",
    "fixed": "#FFF1D6",
    "ssm": "#D5EFE6",
    "frame": "#F7F7F7",
    "plain": "white",
}
INK = "#303030"
MONO = {"family": "DejaVu Sans Mono", "fontsize": 8}
MONO_ADVANCE = 8 * 0.602 / 72
"""Width of one character of the hooks' font, in inches."""


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a Mamba, or of a Mamba-2, that its diagrams state.

    A Mamba has dt_rank, a Mamba-2 n_heads, head_dim and n_groups.
    """

    n_layers: int
    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    vocab_size: int
    dt_rank: int | None = None
    n_heads: int | None = None
    head_dim: int | None = None
    n_groups: int | None = None

    @classmethod
    def of(cls, source: ModelSizes | Mapping[str, int] | object) -> ModelSizes:
        """From a mapping, or from any object with attributes, of (at least) a Mamba's or a Mamba-2's names.

        Raises:
            ValueError: a name is missing.
        """
        if isinstance(source, cls):
            return source
        values = {field.name: _size(source, field.name) for field in fields(cls)}
        names = [name for name in values if name not in (_SSD if values["n_heads"] is None else _S6)]
        if missing := [name for name in names if values[name] is None]:
            raise ValueError(
                f"a diagram of the model needs the sizes {', '.join(names)}; missing: {', '.join(missing)}"
            )
        return cls(**{name: int(size) for name, size in values.items() if name in names and size is not None})

    @property
    def n_channels(self) -> int:
        """How many channels the conv has: E, or in a Mamba-2 X = E + 2 G N."""
        return self.d_inner + 2 * (self.n_groups or 0) * self.d_state

    def table(self) -> pd.DataFrame:
        """Columns size, value: the table of a Result of the experiments `architecture` and `ssm_internals`."""
        sizes = {name: value for name, value in asdict(self).items() if value is not None}
        return pd.DataFrame({"size": list(sizes), "value": list(sizes.values())})

    @classmethod
    def of_result(cls, result: Result) -> ModelSizes:
        """From a Result with the columns of `table`."""
        require(result, "size", "value")
        return cls.of(dict(zip(result.table["size"], result.table["value"], strict=True)))

    @property
    def lines(self) -> list[str]:
        """What each letter stands for in this model, a line each."""
        return [
            f"layers = {self.n_layers}",
            f"D (d_model) = {self.d_model}",
            *self.inner_lines[:-1],
            f"d_conv = {self.d_conv}",
            f"V (vocabulary) = {self.vocab_size}",
            self.inner_lines[-1],
        ]

    @property
    def inner_lines(self) -> list[str]:
        """The same of the letters inside a mixer."""
        if self.n_heads is None:
            own = [f"E (d_inner) = {self.d_inner}", f"N (d_state) = {self.d_state}", f"R (dt_rank) = {self.dt_rank}"]
        else:
            own = [
                f"E (d_inner) = H P = {self.d_inner}",
                f"H (heads) = {self.n_heads}, P (head_dim) = {self.head_dim}",
                f"N (d_state) = {self.d_state}, G (groups) = {self.n_groups}",
                f"X = E + 2 G N = {self.n_channels}",
            ]
        return [*own, "B batch, L positions"]


_S6, _SSD = ("dt_rank",), ("n_heads", "head_dim", "n_groups")


def _size(source: Mapping[str, int] | object, name: str) -> int | None:
    """A size by its name; None if there is none, or the model says that its family has none."""
    if isinstance(source, Mapping):
        return source.get(name)
    try:
        return getattr(source, name, None)
    except ValueError:
        return None


@dataclass(frozen=True)
class Box:
    """A drawn box by its centre and size; its sides are where arrows start and end. y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> float:
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height / 2

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2


class Diagram:
    """A page of `width` × `height` inches whose coordinates are inches from its top left corner."""

    def __init__(self, width: float, height: float, title: str, model: str | None = None) -> None:
        self.figure = new_figure(width, height, layout="none")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()
        title = "  ·  ".join(part for part in (title, model) if part)
        self.axes.text(width / 2, 0.3, title, ha="center", va="center", fontsize=11, parse_math=False)

    def box(
        self, x: float, y: float, text: str, *, width: float = 1.7, height: float = 0.4, kind: str = "learned"
    ) -> Box:
        """A rounded box with centred text; `kind` is a key of FILLS."""
        box = Box(x, y, width, height)
        patch = FancyBboxPatch(
            (box.left, box.top),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=FILLS[kind],
            edgecolor=INK,
            linewidth=0.9,
            zorder=3,
        )
        self.axes.add_patch(patch)
        self.text(x, y, text)
        return box

    def frame(self, left: float, top: float, right: float, bottom: float, text: str) -> None:
        """A dashed region with its name at the top left."""
        patch = FancyBboxPatch(
            (left, top),
            right - left,
            bottom - top,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=FILLS["frame"],
            edgecolor=GREY,
            linestyle=(0, (4, 3)),
            linewidth=0.8,
            zorder=0,
        )
        self.axes.add_patch(patch)
        self.text(left + 0.12, top + 0.18, text, ha="left", color="#505050")

    def operator(self, x: float, y: float, symbol: str) -> Box:
        """A small circle for a sum or a product."""
        radius = 0.15
        circle = Circle((x, y), radius, facecolor="white", edgecolor=INK, linewidth=0.9, zorder=3)
        self.axes.add_patch(circle)
        self.text(x, y, symbol, fontsize=11)
        return Box(x, y, 2 * radius, 2 * radius)

    def text(self, x: float, y: float, text: str, **options) -> None:
        """Text above everything else."""
        options = {"ha": "center", "va": "center", "fontsize": 9, "zorder": 5} | options
        self.axes.text(x, y, text, **options)

    def line(self, *points: tuple[float, float]) -> None:
        """Straight lines through the points."""
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=INK, linewidth=1.1, solid_joinstyle="miter", solid_capstyle="butt", zorder=1)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Straight lines through the points with a head at the last one."""
        start, end = points[-2:]
        if len(points) > 2:
            self.line(*points[:-1])
        head = FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=0.45,head_width=0.22",
            mutation_scale=12,
            shrinkA=0,
            shrinkB=0,
            color=INK,
            linewidth=1.1,
            zorder=2,
        )
        self.axes.add_patch(head)

    def junction(self, x: float, y: float) -> None:
        """A dot where a line splits."""
        self.axes.plot([x], [y], "o", color=INK, markersize=3.2, zorder=2)

    def hook(self, x: float, y: float, name: str, shape: str, side: str = "right") -> None:
        """A hook point on an arrow: a dot, its site name, and its tensor's shape beside or around it."""
        self.axes.plot([x], [y], "o", color=VERMILION, markersize=5.5, zorder=4)
        if side == "around":
            self.text(x, y - 0.13, name, color=VERMILION, **MONO)
            self.text(x, y + 0.13, shape, color="#505050", **MONO)
            return
        gap = 0.11
        width = MONO_ADVANCE * (len(name) + 1 + len(shape))
        left = x + gap if side == "right" else x - gap - width
        self.text(left, y, name, ha="left", color=VERMILION, **MONO)
        self.text(left + MONO_ADVANCE * (len(name) + 1), y, shape, ha="left", color="#505050", **MONO)

    def key(self, x: float, y: float, kinds: Mapping[str, str]) -> None:
        """A legend, a row for each kind of box (a key of FILLS, with its meaning) and one for hook points."""
        for row, (kind, meaning) in enumerate(kinds.items()):
            self.box(x + 0.15, y + 0.27 * row, "", width=0.3, height=0.17, kind=kind)
            self.text(x + 0.42, y + 0.27 * row, meaning, ha="left", fontsize=8.5)
        bottom = y + 0.27 * len(kinds)
        self.axes.plot([x + 0.15], [bottom], "o", color=VERMILION, markersize=5.5)
        self.text(x + 0.42, bottom, "hook point: site name and shape", ha="left", fontsize=8.5)

    def paragraph(self, x: float, y: float, lines: list[str]) -> None:
        """Lines of plain text, the first at (x, y), left-aligned."""
        for row, line in enumerate(lines):
            self.text(x, y + 0.2 * row, line, ha="left", fontsize=8.5)
