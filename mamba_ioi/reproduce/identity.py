"""What tells results apart: which model, whose pairs, and what else was asked for. A folder holds one of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from ..catalogue import CATALOGUE, Study
from ..zoo import EMBEDDED, locate
from .makers import Settings

_WEIGHTS = ("config.json", "tokenizer*.json", "vocab.json", "merges.txt", "*.safetensors", "*.bin")


def model_identity(settings: Settings) -> dict[str, Any]:
    """What tells the model: its name, weights and precision, where it runs, and the version of mamba_ioi."""
    from .. import __version__

    remote = None
    if settings.remote:
        from ..remote.requests import Remote

        remote = str(Remote(settings.remote))
    folder = Path(locate(settings.model))
    local = settings.model != "planted" and folder.is_dir()
    return {
        "model": folder.resolve().name if local and settings.model not in EMBEDDED else settings.model,
        "weights": _digest(folder) if local else None,
        "dtype": settings.dtype,
        "remote": remote,
        "mamba_ioi": __version__,
        "study": None,
    }


def folder_identity(settings: Settings) -> dict[str, Any]:
    """What all figures of one folder must share: the model, and whose pairs they are of, with the content's hash.

    Raises:
        ValueError: if there is no such task.
        OSError: if the file of pairs cannot be read.
    """
    pairs: dict[str, Any] = {"data": None, "task": None}
    if settings.source is not None:
        marks = None if settings.marks is None else list(settings.marks)
        pairs |= settings.source.asked() | {"marks": marks, "metric": settings.metric}
    return model_identity(settings) | pairs


def study_identity(study: Study, settings: Settings) -> dict[str, Any]:
    """What all figures of a study's folder must share: the study, its subjects' weights, and precision and version."""
    from .. import __version__

    folders = {subject: Path(locate(name)) for subject, name in resolve_name(study.subjects).items()}
    weights = ", ".join(f"{subject} {_digest(folder)}" for subject, folder in folders.items())
    return {
        "model": study.name,
        "study": study.name,
        "weights": weights,
        "dtype": settings.dtype,
        "mamba_ioi": __version__,
    }


def request(figure: str, settings: Settings, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What determines a figure's numbers: the folder's identity, and those of the settings that the figure heeds."""
    row = CATALOGUE[figure]
    asked: dict[str, Any] = {"figure": figure, **identity}
    if row.pairs is not None and settings.source is None:
        asked["pairs"] = row.pairs if settings.pairs is None else settings.pairs
    if row.draws and settings.source is None:
        asked["seed"] = settings.seed
    if row.takes_layer:
        asked["layer"] = settings.layer
    if row.takes_channels:
        asked["channels"] = settings.channels
    return asked


def _digest(folder: Path) -> str:
    """SHA-256 over the files of a local model that decide what it computes."""
    digest = hashlib.sha256()
    files = {file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file()}
    for path in sorted(files):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
