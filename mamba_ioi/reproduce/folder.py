"""The folder of `reproduce`: what lies where in it, and the stored results.

A figure is its result (``results/fig4/table.parquet`` and ``meta.json``, which is written last) and its picture
(``fig4.png``, ``fig4.pdf``); the report (``report.html``, ``report.md``) is made of all results in the folder.
``results/bottleneck`` says which layer its figures look at, unless one was named, and by which effects it was chosen.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..catalogue import EVERY, STUDIES, Study
from ..files import locked as locked  # `reproduce.locked`, whose home this was
from ..files import refuse_file
from ..result import META_FILE, Result

RESULTS = "results"
BOTTLENECK = "bottleneck"
"""The name, among the results, of the record of the folder's bottleneck, which is chosen once."""
PLAN = "plan"
"""Likewise of what was chosen to keep to a budget of time."""
ANSWERS = "answers"
"""The folder beside a result for what a server has answered, as long as the result is not complete."""
REPORTS = ("report.html", "report.md")
PICTURES = (".png", ".pdf")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


def stored_result(folder: Path, asked: Mapping[str, Any]) -> Result | None:
    """The folder's complete result if it was asked for alike; None if there is none, or only the start of one.

    Raises:
        ValueError: if the result is damaged, or was asked for otherwise.
    """
    refuse_file(folder)
    if not (folder / META_FILE).exists():
        return None
    try:
        result = Result.load(folder)
    except ValueError as error:
        raise ValueError(f"{folder} holds a damaged result ({error}); delete that folder to compute it again") from None
    _refuse_other(folder, result.meta.get("request"), asked)
    return result


def study_of(out: Path) -> Study | None:
    """The study whose results lie in a folder; None where they are a model's."""
    there = {file.parent.name for file in (out / RESULTS).glob(f"*/{META_FILE}")}
    return next((study for study in STUDIES.values() if there & set(study.catalogue)), None)


def check_folder(out: Path, figures: list[str], identity: Mapping[str, Any]) -> None:
    """See that the figures fit into the folder, and clear away what an interrupted run left unfinished there.

    Raises:
        ValueError: if something is in the way of a figure, or a result of another model or version is there.
    """
    refuse_file(out / RESULTS)
    for figure in (*EVERY, BOTTLENECK, PLAN):
        folder = out / RESULTS / figure
        if figure in figures or not (folder / META_FILE).is_file():
            continue
        try:
            made = Result.load(folder).meta.get("request")
        except ValueError:  # a damaged result of a figure that is not asked for is not this run's business
            continue
        _refuse_other(folder, made, identity)
    for figure in figures:
        for suffix in PICTURES:
            if (out / f"{figure}{suffix}").is_dir():
                raise ValueError(f"{out / figure}{suffix} is a folder where a picture is to be written")
    for name in REPORTS:
        if (out / name).is_dir():
            raise ValueError(f"{out / name} is a folder where the report is to be written")
    for folder in (out, *(out / RESULTS / figure for figure in figures)):
        for file in folder.iterdir() if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(file.name) and file.is_file():
                file.unlink()


def _refuse_other(folder: Path, made: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> None:
    if not isinstance(made, dict):
        raise ValueError(f"{folder} holds a result of another origin; choose another --out, or delete that folder")
    if differing := [key for key in asked if made.get(key) != asked[key]]:
        for causes in (["model"], ["data", "task"]):  # the rest follows from them
            differing = [key for key in causes if key in differing] or differing
        raise ValueError(
            f"{folder} holds a result with {_listed(made, differing)}, and {_listed(asked, differing)} is asked for; "
            f"choose another --out, or delete that folder"
        )


def discard_answers(folder: Path) -> None:
    """Take away what a server answered for a result, now that the result is stored."""
    shutil.rmtree(folder / ANSWERS, ignore_errors=True)


def _listed(values: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={str(values.get(key))[:40]}" for key in keys)
