"""`reproduce --study`: every figure of a study of several packaged models, in a folder, and its report."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from ..catalogue import STUDIES, Study, choose
from .folder import RESULTS, check_folder, locked, stored_result
from .identity import study_identity
from .makers import Settings
from .run import Outcome, complete, written_report

if TYPE_CHECKING:
    from ..models.model import CausalLM
    from ..result import Result


def reproduce_study(
    name: str,
    settings: Settings,
    out: str | os.PathLike[str],
    only: str | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Compute the figures of a study that are not there yet; each result is stored before it is drawn. Then its report.

    Args:
        name: the study's name.
        settings: what to ask for: pairs, seed, device, dtype, memory and progress count.
        out: the folder.
        only: ids of figures with commas between; all of the study's if None.
        report: called with each outcome as soon as it is known.

    Returns:
        The outcomes, the report's last.

    Raises:
        ValueError: for an unknown study or figure, or a folder that holds a damaged result, or one that was made
            otherwise, or that another run is using.
        OSError: if the folder cannot be written.
    """
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
    study, outcomes = STUDIES[name], []
    rows = study.catalogue
    figures = choose(only, rows)
    out = Path(os.path.expanduser(out))
    identity = study_identity(study, settings)
    asked = {
        figure: {"figure": figure, **identity, "pairs": settings.pairs or rows[figure].pairs, "seed": settings.seed}
        for figure in figures
    }
    subjects: dict[str, CausalLM] = {}

    def work(figure: str) -> Result:
        from ..result import Result

        subjects.update(subjects or _loaded(study, settings))
        found = resolve_name(str(rows[figure].function))(
            subjects, pairs=asked[figure]["pairs"], seed=settings.seed, progress=settings.progress
        )
        return Result(found.table, found.meta | {"request": asked[figure]})

    with locked(out, "--out"):
        check_folder(out, figures, identity)
        found = {figure: stored_result(out / RESULTS / figure, asked[figure]) for figure in figures}
        for figure in figures:
            outcomes.append(complete(figure, found[figure], out, work))
            report(outcomes[-1])
        outcomes.append(written_report(out))
        report(outcomes[-1])
    return outcomes


def _loaded(study: Study, settings: Settings) -> dict[str, CausalLM]:
    """The subjects, loaded."""
    from ..models.model import load_model

    found = {}
    for subject, name in resolve_name(study.subjects).items():
        found[subject] = load_model(name, device=settings.device, dtype=settings.dtype)
        found[subject].memory = settings.memory
    return found
