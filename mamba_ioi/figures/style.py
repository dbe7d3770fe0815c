"""What all figures share: fonts, colours, the Figure class, saving, and the checks of a result's table."""

from __future__ import annotations

import io
import os
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mamba_ioi.files import replace_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from matplotlib.typing import RcKeyType

    from mamba_ioi.result import Result

DPI = 200
HEADING_ADVANCE = 0.086
"""Mean width of a character of the heading, in inches."""
RC: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "figure.titlesize": 11,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
}

# Okabe & Ito's colours, which people with colour-blindness tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#7F7F7F"
LIGHT_GREY = "#D9D9D9"


class PlainFigure(Figure):
    """A Figure outside pyplot's global list, which still shows itself as the last value of a notebook cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def new_figure(width: float, height: float, **options) -> PlainFigure:
    """An empty white figure of `width` × `height` inches, laid out by matplotlib's constrained layout."""
    options.setdefault("layout", "constrained")
    figure = PlainFigure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def paper_style() -> Iterator[None]:
    """The figures' fonts and lines, for the time of a `with` block or a decorated function."""
    with mpl.rc_context(RC):
        yield


def save_figure(figure: Figure, stem: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `stem`.png (200 dpi) and `stem`.pdf; neither name exists before its file is complete.

    Args:
        figure: any matplotlib figure.
        stem: path without suffix; its folder is made if absent.

    Returns:
        The paths of the PNG and of the PDF.
    """
    stem = Path(os.path.expanduser(stem))
    paths = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")
    pictures = {}
    with paper_style():
        for path in paths:
            kind, picture = path.suffix[1:], io.BytesIO()
            figure.savefig(picture, format=kind, dpi=DPI, metadata={"CreationDate": None} if kind == "pdf" else None)
            pictures[path.name] = picture.getvalue()
    replace_files(stem.parent, pictures)
    return paths


def require(result: Result, *columns: str) -> None:
    """Refuse a result whose table is empty or lacks a column that its figure needs.

    Raises:
        ValueError: which columns are missing, and what the table has.
    """
    name = result.meta["experiment"]
    if missing := [column for column in columns if column not in result.table.columns]:
        raise ValueError(
            f"the figure of {name!r} needs the column {missing[0]!r}; the table has {list(result.table.columns)}"
        )
    if result.table.empty:
        raise ValueError(f"the figure of {name!r} needs at least one row; the table is empty")


def set_heading(figure: Figure, result: Result, title: str, note: str = "") -> None:
    """Head the figure with its title, the model's name where the result knows it, and a note such as `n = 32`.

    On one line if the figure is wide enough, else with the title on a line of its own.
    """
    room = int(figure.get_figwidth() / HEADING_ADVANCE)
    details = "  ·  ".join(str(part) for part in (result.meta.get("model"), note) if part)
    text = "  ·  ".join(part for part in (title, details) if part)
    if len(text) > room:
        text = "\n".join(textwrap.fill(part, room) for part in (title, details) if part)
    figure.suptitle(text, parse_math=False)


def prompts_note(result: Result) -> str:
    """`n = 32`, or `n = 30–32` where rows differ; empty if the table does not say."""
    if "n" not in result.table.columns:
        return ""
    low, high = result.table["n"].min(), result.table["n"].max()
    return f"n = {low}" if low == high else f"n = {low}–{high}"


def error_lengths(table: pd.DataFrame, column: str, low: str = "low", high: str = "high") -> np.ndarray | None:
    """Lengths [2, rows] of whiskers from `column` down to `low` and up to `high`; None without those columns."""
    if not {low, high} <= set(table.columns):
        return None
    return np.stack([table[column] - table[low], table[high] - table[column]]).clip(min=0)


def literal(text: object) -> str:
    """A token or label as one line of text: line breaks and tabs are written as escapes."""
    return str(text).replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
