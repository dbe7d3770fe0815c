"""What tokens read of each other as an interactive page: one self-contained HTML file with a slider over layers."""

from __future__ import annotations

import base64
import html
import json
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LARGEST = 32767


def token_page(
    title: str, note: str, tokens: Sequence[str], panels: Sequence[tuple[str, Mapping[str, np.ndarray]]]
) -> str:
    """The page's text; it loads nothing from anywhere.

    Opened with ``#selftest``, it moves its slider and a pointer and writes onto its body what it then shows, for tests
    in a browser.

    Args:
        title: of the page.
        note: what is shown, in sentences.
        tokens: the tokens' texts.
        panels: for each place of the slider its name and its views, by name: matrices ``[L, L]`` of target and source,
            of which what is not after the target is shown, to 1 part in 32767 of the largest.

    Raises:
        ValueError: if there is nothing to show, or a matrix is not that of the tokens.
    """
    if not panels or not tokens:
        raise ValueError("a page of tokens has at least one token and one layer to show")
    stored = []
    for name, views in panels:
        stored.append({"name": name, "views": {of: _stored(matrix, len(tokens)) for of, matrix in views.items()}})
    template = Template(resources.files("mamba_ioi.figures").joinpath("token_page.html").read_text(encoding="utf-8"))
    data = json.dumps({"tokens": list(tokens), "panels": stored}, ensure_ascii=False).replace("<", "\\u003c")
    return template.substitute(title=html.escape(title), note=html.escape(note), data=data)


def _stored(matrix: np.ndarray, length: int) -> dict[str, str | float]:
    """The lower triangle, row by row, as base64 of 16-bit numbers, and what one of them counts."""
    if matrix.shape != (length, length) or not np.isfinite(matrix).all():
        raise ValueError(f"a view is a finite matrix of {length} by {length} tokens, not of shape {matrix.shape}")
    values = matrix[np.tril_indices(length)].astype(np.float64)
    unit = max(float(np.abs(values).max()), 1e-300) / _LARGEST
    return {"unit": unit, "values": base64.b64encode(np.rint(values / unit).astype("<i2").tobytes()).decode()}
