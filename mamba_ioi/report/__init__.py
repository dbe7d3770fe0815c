"""The report of ``mamba-ioi reproduce``: for each claim of the paper, what the stored results of a model say of it.

Of another task's pairs it asks the same, but for what is about names, and speaks of none.

``report.html`` is one file that loads nothing; ``report.md`` links to the pictures beside it. Both are made from what
lies in the folder, never from a model, and the same folder gives the same report.
"""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from urllib.parse import quote

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from ..catalogue import CATALOGUE, EVERY, Row
from ..figures import circuit_html
from ..figures.companions import GRAPHS
from ..files import replace_files
from ..reproduce.folder import BOTTLENECK, PLAN, REPORTS, RESULTS, study_of
from ..reproduce.plan import Plan
from ..result import META_FILE, Result
from .claims import QUESTIONS, judge, setting_of
from .evidence import Claim, Finding, Number, Results, Table, number_table, of_own_pairs
from .opening import commands, figure_rows, model_name, setting_table, study_command, task_name
from .pictures import picture

__all__ = ["QUESTIONS", "Claim", "Finding", "Number", "Table", "judge", "stored_results", "write_report"]

PAGE, MARKDOWN = REPORTS
OF_THE_PAPER = ("corruption", "template", "position", "label")
"""Columns in whose place tables of other pairs have their own group's, or ``mark``."""
FEW = 20
_SPECIAL = re.compile(r"([\\`*_{}\[\]<#|~&$])")


def write_report(out: str | os.PathLike[str]) -> list[Path]:
    """Write ``report.html`` and ``report.md`` of the results in a folder; a file that is right already is left alone.

    Args:
        out: a folder that ``mamba-ioi reproduce`` wrote.

    Returns:
        The files that were written.

    Raises:
        ValueError: if the folder holds no ``results``.
        OSError: if it cannot be written.
    """
    out = Path(os.path.expanduser(out))
    if not (out / RESULTS).is_dir():
        raise ValueError(f"{out} holds no results of mamba-ioi reproduce: {out / RESULTS} is not there")
    results, damaged = stored_results(out)
    content = _content(out, results, damaged)
    files = {
        name: _environment(name).get_template(name).render(content).encode("utf-8", "backslashreplace")
        for name in (MARKDOWN, PAGE)
    }
    stale = {
        name: text for name, text in files.items() if not (out / name).is_file() or (out / name).read_bytes() != text
    }
    replace_files(out, stale)
    return [out / name for name in stale]


def rows_in(out: Path) -> dict[str, Row]:
    """The rows that a folder's figures are of: a study's, or the paper's."""
    study = study_of(out)
    return CATALOGUE if study is None else study.catalogue


def stored_results(out: Path) -> tuple[dict[str, Result], list[str]]:
    """The complete results of a folder by figure, in the order of the rows, and a sentence on each that is damaged."""
    results, damaged = {}, []
    for figure, row in rows_in(out).items():
        folder = out / RESULTS / figure
        if not (folder / META_FILE).exists():
            continue
        try:
            result = Result.load(folder)
        except (OSError, ValueError) as error:
            damaged.append(f"{row.label}: its stored result is damaged and left out ({error}).")
            continue
        needed = [column for column in row.columns if of_own_pairs(result) or column not in OF_THE_PAPER]
        if missing := [column for column in needed if column not in result.table.columns]:
            damaged.append(f"{row.label}: its stored result lacks the column {missing[0]} and is left out.")
            continue
        results[figure] = result
    return results, damaged


def paper_numbers(results: Results) -> dict[str, Any] | None:
    """The paper's numbers, if the results are those of the paper's model and pairs."""
    from ..reference import is_paper_model, numbers

    models, own = {result.meta.get("model") for result in results.values()}, map(of_own_pairs, results.values())
    return numbers() if all(own) and len(models) == 1 and is_paper_model(models.pop()) else None


def few_rows(results: Results) -> int | None:
    """How many rows the pairs of another task have, if so few that intervals say little."""
    rows = min((int(result.meta["rows"]) for result in results.values() if "rows" in result.meta), default=FEW)
    return rows if rows < FEW else None


def recorded_bottleneck(out: Path) -> tuple[Result | None, list[str]]:
    """The folder's record of its bottleneck, None if there is none; and a sentence if it is damaged."""
    folder = out / RESULTS / BOTTLENECK
    if not (folder / META_FILE).exists():
        return None, []
    try:
        result = Result.load(folder)
        int(result.meta["arguments"]["layer"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        return None, [f"The record of the bottleneck is damaged and left out ({error})."]
    return result, []


def recorded_plan(out: Path) -> Plan | None:
    """What the folder's figures were chosen by, where there was a budget of time; None without, or if it is damaged."""
    folder = out / RESULTS / PLAN
    if not (folder / META_FILE).exists():
        return None
    try:
        return Plan.of(Result.load(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _content(out: Path, results: dict[str, Result], damaged: list[str]) -> dict[str, Any]:
    """What both templates are filled with."""
    study, rows = study_of(out), rows_in(out)
    paper, task = paper_numbers(results), task_name(results)
    bottleneck, broken = recorded_bottleneck(out)
    layer = None if bottleneck is None else int(bottleneck.meta["arguments"]["layer"])
    claims = judge(results, paper, layer, QUESTIONS if study is None else resolve_name(study.questions))
    told = [(finding.figure, claim.key) for claim in claims for finding in claim.findings]
    homes = dict(sorted(told, key=lambda pair: pair[1] in EVERY[pair[0]].decides))  # what it decides comes last
    pictures = {figure: picture(out, figure, setting_of(results).metric) for figure in results}
    missing = [name for name, row in rows.items() if name not in results and not (task and row.needs_names)]
    return {
        "model": model_name(results),
        "task": task,
        "study": study,
        "title": study.title if study else f"{task} in {model_name(results)}" if task else _title(results),
        "few": few_rows(results) if task else None,
        "paper": paper is not None,
        "said_of": study.source if study else "of mamba-370m",
        "claims": claims,
        "homes": homes,
        "pictures": pictures,
        "apart": [figure for figure in results if figure not in homes],
        "setting": setting_table(results, bottleneck, recorded_plan(out)),
        "figures": figure_rows(results, rows),
        "missing": missing,
        "damaged": damaged + broken,
        "commands": [study_command(study, results)] if study else commands(results),
        "labels": {figure: row.label for figure, row in EVERY.items()},
        "graphs": {
            figure: circuit_html(result)
            for figure, result in results.items()
            if result.meta["experiment"] in GRAPHS and not result.table.empty
        },
        "number_table": number_table,
    }


def _title(results: Results) -> str:
    return f"The IOI circuit of {model_name(results)}"


def _environment(name: str) -> Environment:
    """Jinja with one template, in which every value is escaped for the template's language."""
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    options |= {"keep_trailing_newline": True, "loader": DictLoader({name: text})}
    if name == PAGE:
        return Environment(autoescape=True, **options)
    environment = Environment(finalize=markdown, **options)
    environment.filters["code"] = lambda value: Markup(f"`{_line(value).replace('`', '')}`")
    environment.filters["link"] = lambda value: Markup(quote(value))
    environment.globals["grid"] = markdown_table
    return environment


def markdown(value: object) -> str:
    """A value as literal text in Markdown, without line breaks; what is Markup already stays as it is."""
    return value if isinstance(value, Markup) else _SPECIAL.sub(r"\\\1", _line(value))


def markdown_table(table: Table) -> Markup:
    """The table with its caption, in GitHub's Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    rows = ["| " + " | ".join(cell if cell == "---" else markdown(cell) for cell in line) + " |" for line in lines]
    return Markup("\n".join([f"**{markdown(table.caption)}**", "", *rows]))


def _line(value: object) -> str:
    return re.sub(r"\s+", " ", str(value))
