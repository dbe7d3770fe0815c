"""The report's pictures: what each shows and how to read it, and how it gets into one file."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from pathlib import Path

from ..figures.style import DPI
from ..makers import MAKERS
from .evidence import LABELS

CSS_DPI = 96
_EFFECT = "1: the answer follows the corrupt prompt all the way; 0: not at all"

READING = {
    "fig2": "The model from tokens to logits, and one layer opened; the names are those of the activations.",
    "fig3": "Every layer reads the sum of all that was written before it: an edge for each writer and reader.",
    "fig4": f"A panel for each corruption; rows are layers, columns tokens. Each cell: the layer's input resampled at "
    f"that position ({_EFFECT}).",
    "fig5": "The answer's mean probability among the prompt's names, and its accuracy, with each layer's output set to "
    "zero.",
    "fig5_greedy": "Accuracy as layers are removed one after another, each time the one that costs least.",
    "fig6": "In what share of the minimal sets, one for each template and corruption, each layer is.",
    "fig7": "Cosine of what each token adds to the state (rows) with the state after each token (columns).",
    "fig8": f"A panel for each corruption; rows are taps of the convolution, columns its output positions ({_EFFECT}).",
    "fig9": "The share of test prompts where the name that was written in wins; columns are the slot its mean is from, "
    "rows the slot it is written into.",
    "fig9_pca": "Each point is the mean activation of one name in one slot.",
    "fig10": f"As Figure 4, for the state of the SSM: later states follow from the one that is resampled ({_EFFECT}).",
    "fig11": f"As Figure 4, for what each layer adds to the residual stream ({_EFFECT}).",
    "fig12": "Inside the selective SSM; the names are those of the activations.",
    "appd1": "Rows are sources, columns destinations: the edges that are kept, each edge's attribution (also with "
    "colours clamped), and measured effects.",
    "appd2": "For each layer, which of its conv slices, its skip and its SSM ACDC keeps, and how much NLD falls "
    "without each.",
    "appd3": "The circuit from embed to output; labels say at which positions an edge is kept.",
    "sec44": "Accuracy and mean NLD of the positional circuit, whole and without the bottleneck's edges before the "
    "last position.",
}


@dataclass(frozen=True)
class Picture:
    """A figure's PNG in the report.

    Attributes:
        figure: the figure's id.
        title: its name in the paper, and what it shows.
        reading: how to read it.
        file: the PNG's name, beside the report.
        uri: the PNG as a data URI; None if there is no such file.
        width: in CSS pixels, at the size it was drawn for.
        height: likewise.
        others: names of further PNGs of the figure.
    """

    figure: str
    title: str
    reading: str
    file: str
    uri: str | None
    width: int
    height: int
    others: tuple[str, ...] = ()

    @property
    def alt(self) -> str:
        """What is said in the picture's place."""
        return f"{self.title}. {self.reading}"


def picture(out: Path, figure: str) -> Picture:
    """The figure's picture as it lies in the folder, complete: nothing is scaled down."""
    file = out / f"{figure}.png"
    content = file.read_bytes() if file.is_file() else b""
    width, height = _size(content)
    others = sorted(out.glob(f"{figure}_tables.png")) + sorted(
        out.glob(f"{figure}_layer*.png"), key=lambda path: (len(path.name), path.name)
    )
    return Picture(
        figure,
        f"{LABELS[figure]}: {MAKERS[figure].shows}",
        READING[figure],
        file.name,
        f"data:image/png;base64,{base64.b64encode(content).decode()}" if width else None,
        round(width * CSS_DPI / DPI),
        round(height * CSS_DPI / DPI),
        tuple(path.name for path in others),
    )


def _size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the PNG's header; 0, 0 for what is none."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        return 0, 0
    return struct.unpack(">II", png[16:24])
