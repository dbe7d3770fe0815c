"""Models that ship with the package: those in `EMBEDDED`, trained here, and `planted`, with a known circuit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_HERE = Path(__file__).parent

EMBEDDED: Mapping[str, Path] = {
    "tiny": _HERE / "tiny",
    "tiny-mamba2": _HERE / "tiny_mamba2",
    "recall-mamba": _HERE / "recall_mamba",
    "recall-mamba-noconv": _HERE / "recall_mamba_noconv",
    "recall-mamba2": _HERE / "recall_mamba2",
    "recall-attention": _HERE / "recall_attention",
}
"""The folder of each trained model that ships with the package, by the name that `load_model` takes."""

DICTIONARIES: Mapping[str, tuple[str, ...]] = {"tiny": ("ssm_input", "out_proj")}
"""The sites of each packaged model that a dictionary of features ships for, in the order of execution."""

RECALL: Mapping[str, str] = {name.removeprefix("recall-"): name for name in EMBEDDED if name.startswith("recall-")}
"""The subjects of the recall study, a packaged model each."""


def locate(name: str | os.PathLike[str]) -> str:
    """Where a model is: the folder of an embedded one; else the name itself, with ``~`` written out."""
    return str(EMBEDDED[name]) if isinstance(name, str) and name in EMBEDDED else os.path.expanduser(os.fspath(name))
