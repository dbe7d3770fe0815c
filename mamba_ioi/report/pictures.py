"""The report's pictures: what each shows and how to read it, and how it gets into one file."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from pathlib import Path

from ..catalogue import EFFECT, EVERY
from ..figures.style import DPI

CSS_DPI = 96


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


def picture(out: Path, figure: str, metric: str = "nld") -> Picture:
    """The figure's picture as it lies in the folder, complete: nothing is scaled down.

    Args:
        out: the folder.
        figure: the figure's id.
        metric: what effects are of.
    """
    row, file = EVERY[figure], out / f"{figure}.png"
    content = file.read_bytes() if file.is_file() else b""
    width, height = _size(content)
    others = sorted(out.glob(f"{figure}_tables.png")) + sorted(
        out.glob(f"{figure}_layer*.png"), key=lambda path: (len(path.name), path.name)
    )
    return Picture(
        figure,
        f"{row.label}: {row.shows}",
        row.reading if metric == "nld" else row.reading.replace(EFFECT, f"how much {metric} falls"),
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
