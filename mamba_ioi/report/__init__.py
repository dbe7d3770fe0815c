"""The report of ``mamba-ioi reproduce``: for each claim of the paper, what the stored results of a model say of it.

``report.html`` is one file that loads nothing; ``report.md`` links to the pictures beside it. Both are made from what
lies in the folder, never from a model, and the same folder gives the same report.
"""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from ..catalogue import CATALOGUE
from ..figures import circuit_html
from ..figures.companions import GRAPHS
from ..files import replace_files
from ..reproduce.folder import REPORTS, RESULTS
from ..result import META_FILE, Result
from .claims import QUESTIONS, judge
from .evidence import Claim, Finding, Number, Results, Table, number_table
from .opening import commands, figure_rows, model_name, setting_table
from .pictures import picture

__all__ = ["QUESTIONS", "Claim", "Finding", "Number", "Table", "judge", "stored_results", "write_report"]

PAGE, MARKDOWN = REPORTS
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


def stored_results(out: Path) -> tuple[dict[str, Result], list[str]]:
    """The complete results of a folder by figure, in the paper's order, and a sentence on each that is damaged."""
    results, damaged = {}, []
    for figure, row in CATALOGUE.items():
        folder = out / RESULTS / figure
        if not (folder / META_FILE).exists():
            continue
        try:
            result = Result.load(folder)
        except (OSError, ValueError) as error:
            damaged.append(f"{row.label}: its stored result is damaged and left out ({error}).")
            continue
        if missing := [column for column in row.columns if column not in result.table.columns]:
            damaged.append(f"{row.label}: its stored result lacks the column {missing[0]} and is left out.")
            continue
        results[figure] = result
    return results, damaged


def paper_numbers(results: Results) -> dict[str, Any] | None:
    """The paper's numbers, if the results are those of the paper's model."""
    from ..reference import is_paper_model, numbers

    models = {result.meta.get("model") for result in results.values()}
    return numbers() if len(models) == 1 and is_paper_model(models.pop()) else None


def _content(out: Path, results: dict[str, Result], damaged: list[str]) -> dict[str, Any]:
    """What both templates are filled with."""
    paper = paper_numbers(results)
    claims = judge(results, paper)
    homes = {finding.figure: claim.key for claim in claims for finding in claim.findings}
    pictures = {figure: picture(out, figure) for figure in results}
    missing = [figure for figure in CATALOGUE if figure not in results]
    return {
        "model": model_name(results),
        "paper": paper is not None,
        "claims": claims,
        "homes": homes,
        "pictures": pictures,
        "apart": [figure for figure in results if figure not in homes],
        "setting": setting_table(results),
        "figures": figure_rows(results),
        "missing": missing,
        "damaged": damaged,
        "commands": commands(results),
        "labels": {figure: row.label for figure, row in CATALOGUE.items()},
        "graphs": {
            figure: circuit_html(result)
            for figure, result in results.items()
            if result.meta["experiment"] in GRAPHS and not result.table.empty
        },
        "number_table": number_table,
    }


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
