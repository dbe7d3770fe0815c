"""`reproduce`: every figure for one model, in a folder, going on where an earlier run stopped.

The figures are the paper's, on its prompts; or, on pairs of another task, those that speak of no names.

A figure is its result (``results/fig4/table.parquet`` and ``meta.json``, which is written last) and its picture
(``fig4.png``, ``fig4.pdf``); the report (``report.html``, ``report.md``) is made of all results in the folder. Each
result's ``meta["request"]`` says what was asked for: a result that is complete and was asked for alike is kept, and one
that was asked for otherwise is never overwritten. The bottleneck is chosen once and recorded: ``results/bottleneck``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalogue import CATALOGUE, EVERY, choose
from .folder import (
    ANSWERS,
    BOTTLENECK,
    PICTURES,
    PLAN,
    REPORTS,
    RESULTS,
    check_folder,
    discard_answers,
    locked,
    stored_result,
)
from .identity import folder_identity, request
from .makers import Given, Settings, bottleneck, make, prepare, unavailable, unfit
from .plan import Plan, duration, planned, prepared_plan

if TYPE_CHECKING:
    from ..models.model import CausalLM
    from ..result import Result

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of one figure, or of the ``report``: its id, what was done in words, and the error if it failed.

    ``there`` says whether it is in the folder now.
    """

    figure: str
    done: str
    error: Exception | None = None
    there: bool = True


def reproduce(
    settings: Settings,
    out: str | os.PathLike[str],
    only: str | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
    announce: Callable[[Plan], None] = lambda plan: None,
) -> list[Outcome]:
    """Compute the figures that are not there yet; each result is stored before it is drawn. Then write the report.

    With a budget of time, the number of pairs is chosen once and recorded in ``results/plan``.

    Args:
        settings: what to ask for.
        out: the folder.
        only: ids of figures with commas between (``fig5`` stands for ``fig5_greedy`` too); all that the model can
            have if None.
        report: called with each outcome as soon as it is known.
        announce: called with what the figures will take, before the first of them is computed.

    Returns:
        The outcomes, the report's last. A figure whose computation fails is among them, with its error, and does not
        end the run.

    Raises:
        ValueError: for an unknown figure or model, a layer that is not there, a tokenizer without names, or a folder
            that holds a damaged result, or one that was made otherwise, or that another run is using; for pairs of
            another task that are not as they should be, or figures that they cannot have.
        OSError: if the folder cannot be written, or the disk is full.
    """
    figures, outcomes = choose(only), []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        report(outcome)

    if settings.source is not None:
        speaking = [figure for figure in figures if CATALOGUE[figure].needs_names]
        figures = [figure for figure in figures if figure not in speaking]
        if not figures:
            others = ", ".join(figure for figure, row in CATALOGUE.items() if not row.needs_names)
            raise ValueError(
                f"{', '.join(speaking)} is about the names in the paper's prompts; of another task there are {others}"
            )
    if settings.layer is not None and not any(CATALOGUE[figure].takes_layer for figure in figures):
        raise ValueError(f"layer={settings.layer} has no meaning for {', '.join(figures)}: none looks at one layer")
    for figure in figures if only is not None else ():
        if (reason := unavailable(figure, settings)) is not None:
            raise ValueError(f"{figure} cannot be made: {reason}")
    out = Path(os.path.expanduser(out))
    identity = folder_identity(settings)

    with locked(out, "--out"):
        check_folder(out, figures, identity)
        model = given = plan = None
        if settings.budget is not None:
            plan, model, given = _within_budget(out, settings, only, figures, identity)
            settings = replace(settings, pairs=plan.pairs)
            for one in plan.left_out:
                told = f"takes about {duration(one.seconds or 0.0)} on {plan.device}"
                note(Outcome(one.figure, f"left out: it {told}, which the budget does not hold", there=False))
                figures.remove(one.figure)
        asked = {figure: request(figure, settings, identity) for figure in figures}
        found = {figure: stored_result(out / RESULTS / figure, asked[figure]) for figure in figures}
        missing = [figure for figure in figures if found[figure] is None]
        chosen: int | Exception | None = None

        def leave_out(figure: str, reason: str) -> None:
            note(Outcome(figure, f"left out: {reason}", there=False))
            figures.remove(figure)
            missing.remove(figure)

        for figure in list(missing):
            if (reason := unavailable(figure, settings)) is not None:
                leave_out(figure, reason)
        if missing:
            model, given = (model, given) if model is not None else prepare(settings, missing)
            if model.remote is not None:
                _refuse_other_precision(out, found, model)
            for figure in list(missing):
                if (reason := unfit(figure, model, given)) is None:
                    continue
                if only is not None:
                    _refuse(figure, model, reason)
                leave_out(figure, reason)
            announce(plan or planned(model, settings, missing, given))
            if model.has_scans and any(CATALOGUE[figure].draws for figure in figures if found[figure] is None):
                chosen = _choose_layer(out, model, settings, given, identity)

        def work(figure: str) -> Result:
            from ..remote.requests import answers_in

            assert model is not None
            if not CATALOGUE[figure].takes_layer or settings.layer is not None:
                own = settings
            elif isinstance(chosen, Exception):
                raise chosen
            else:
                own = replace(settings, layer=chosen)
            with answers_in(model, out / RESULTS / figure / ANSWERS, asked[figure]):
                return compute(figure, model, own, asked[figure], given)

        for figure in figures:
            note(complete(figure, found[figure], out, work))
        note(written_report(out))
    return outcomes


def complete(figure: str, result: Result | None, out: Path, work: Callable[[str], Result]) -> Outcome:
    """Compute a figure that is not there yet, store it, and draw it.

    Args:
        figure: its id.
        result: its stored result; None if there is none.
        out: the folder.
        work: computes it, from its id.

    Raises:
        ConnectionError: if a server cannot be reached; other errors of the computation are in the outcome.
        OSError: if the folder cannot be written.
    """
    started, done, stored = time.monotonic(), "drawn again from its result", result is not None
    try:
        if result is None:
            result, done = work(figure), "computed"
    except ConnectionError as error:
        raise ConnectionError(f"{error}; what was computed is kept, and the same command goes on") from error
    except Exception as error:
        return _failed(figure, error)
    if not stored:
        _store(result, out, figure)
    elif all((out / f"{figure}{suffix}").exists() for suffix in PICTURES):
        return Outcome(figure, "kept, it was complete")
    return _draw(result, out, figure) or Outcome(figure, f"{done} in {time.monotonic() - started:.1f} s")


def redraw(out: str | os.PathLike[str], report: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Draw every result that is stored in a folder of `reproduce` again, and its report; nothing is computed.

    Args:
        out: the folder.
        report: called with each outcome as soon as it is known.

    Raises:
        ValueError: if another run is using the folder, or it holds no results.
        OSError: if the folder cannot be written, or the disk is full.
    """
    from ..result import META_FILE, Result

    out = Path(os.path.expanduser(out))
    if not (out / RESULTS).is_dir():
        raise ValueError(f"{out} holds no results of mamba-ioi reproduce: {out / RESULTS} is not there")
    outcomes: list[Outcome] = []
    with locked(out, "--out"):
        for figure in (figure for figure in EVERY if (out / RESULTS / figure / META_FILE).exists()):
            try:
                outcome = _draw(Result.load(out / RESULTS / figure), out, figure) or Outcome(figure, "drawn again")
            except ValueError as error:
                outcome = _failed(figure, error)
            outcomes.append(outcome)
            report(outcome)
        outcomes.append(written_report(out))
        report(outcomes[-1])
    return outcomes


def _refuse(figure: str, model: CausalLM, reason: str) -> None:
    """Refuse a figure that is asked for by its id, and cannot be made of this model or these pairs.

    Raises:
        ValueError: always.
    """
    if CATALOGUE[figure].needs_mamba:
        model.require_mamba(f"{figure} and its like")
    raise ValueError(f"{figure} cannot be made of these pairs: {reason}")


def _within_budget(
    out: Path, settings: Settings, only: str | None, figures: Sequence[str], identity: Mapping[str, Any]
) -> tuple[Plan, CausalLM | None, Given | None]:
    """The folder's plan as it is recorded there; or made now and recorded, with the model that it was measured on."""
    from ..result import Result

    folder = out / RESULTS / PLAN
    asked = {"figure": PLAN, **identity, "budget": settings.budget, "only": only, "most": settings.pairs}
    if (stored := stored_result(folder, asked)) is not None:
        return Plan.of(stored), None, None
    plan, model, given = prepared_plan(settings, figures)
    result = plan.result(model)
    Result(result.table, result.meta | {"request": asked}).save(folder)
    return plan, model, given


def _choose_layer(
    out: Path, model: CausalLM, settings: Settings, given: Given | None, identity: Mapping[str, Any]
) -> int | Exception:
    """The folder's bottleneck as it is recorded there, or chosen now and recorded; an error where there is none."""
    from ..remote.requests import answers_in
    from ..result import Result

    folder, asked = out / RESULTS / BOTTLENECK, {"figure": BOTTLENECK, **identity}
    result = stored_result(folder, asked)
    if result is None:
        try:
            with answers_in(model, folder / ANSWERS, asked):
                result = bottleneck(model, settings, given)
        except OSError:
            raise
        except Exception as error:
            logger.debug("no bottleneck was found", exc_info=error)
            return error
        for name in REPORTS:
            (out / name).unlink(missing_ok=True)
        result = Result(result.table, result.meta | {"request": asked})
        result.save(folder)
        discard_answers(folder)
    return result.meta["arguments"]["layer"]


def compute(
    figure: str, model: CausalLM, settings: Settings, asked: Mapping[str, Any], given: Given | None = None
) -> Result:
    """The figure's result, which says what was asked for."""
    from ..result import Result

    result = make(CATALOGUE[figure], model, settings, given)
    return Result(result.table, result.meta | {"request": dict(asked)})


def _store(result: Result, out: Path, figure: str) -> None:
    """Save the result; take away pictures and reports that were made without it, so that none passes for its own."""
    for name in (*(f"{figure}{suffix}" for suffix in PICTURES), *REPORTS):
        (out / name).unlink(missing_ok=True)
    result.save(out / RESULTS / figure)
    discard_answers(out / RESULTS / figure)


def _draw(result: Result, out: Path, figure: str) -> Outcome | None:
    """Draw a result into the folder; the outcome if that fails."""
    from ..figures import save_companions, save_figure

    try:
        save_companions(result, out / figure)
        save_figure(result.plot(), out / figure)
    except OSError:
        raise
    except Exception as error:
        return _failed(figure, error)
    return None


def written_report(out: Path) -> Outcome:
    """Write the report of what is in the folder."""
    from ..report import write_report

    try:
        written = write_report(out)
    except OSError:
        raise
    except Exception as error:
        return _failed("report", error)
    return Outcome("report", "written" if written else "kept, it was complete")


def _failed(figure: str, error: Exception) -> Outcome:
    logger.debug("%s failed", figure, exc_info=error)
    return Outcome(figure, "failed", error, there=False)


def _refuse_other_precision(out: Path, found: Mapping[str, Result | None], model: CausalLM) -> None:
    """Refuse results beside which others, computed in another precision, would stand.

    Raises:
        ValueError: naming both.
    """
    for figure, result in found.items():
        if result is not None and result.meta.get("dtype") != str(model.dtype):
            raise ValueError(
                f"{out / RESULTS / figure} holds a result computed in {result.meta.get('dtype')}, and {model.remote} "
                f"computes in {model.dtype}; choose another --out"
            )
