"""What of every family is tested, and how it went: the table of docs/families.md, written by the tests themselves.

A test that holds a family to something is marked ``conformance("column")``, or ``conformance("column", refused=True)``
if what it holds is that this is refused in a sentence. ``pytest --conformance DIR`` writes what came out into
``DIR/VERSION.json``, VERSION being that of transformers; with ``--collect-only``, what comes out if every test passes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
import transformers

COLUMNS = (
    *("load", "logits", "sites read", "sites patched", "h propagates", "sweep = run", "generate"),
    *("edges", "EAP", "parts", "fine", "remote"),
)
"""What a family is held to, in the order of the table."""
FAMILIES = (
    *("mamba", "falcon_mamba", "mamba2"),
    *("jamba", "bamba", "zamba2", "nemotron_h", "granitemoehybrid", "falcon_h1"),
)
"""The rows of the table; a parameter such as ``falcon_h1 no norm`` counts with its first word."""
OUTCOMES = ("passed", "refused", "failed")


class Conformance:
    """The plugin that counts each family's tests by column and outcome.

    Args:
        folder: where the table goes; None to write none.
        collected: whether tests are collected only, so that they count as they are meant to end.
    """

    def __init__(self, folder: str | None, collected: bool = False) -> None:
        self.folder, self.collected = folder, collected
        self.cells: dict[tuple[str, str], Counter[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if (mark := item.get_closest_marker("conformance")) is None:
                continue
            column, outcome = mark.args[0], "refused" if mark.kwargs.get("refused") else "passed"
            params = item.callspec.params  # pyright: ignore[reportAttributeAccessIssue]
            family = next(params[name] for name in ("model", "served", "family") if name in params).split()[0]
            if column not in COLUMNS:
                raise ValueError(f"{item.nodeid} is of {column!r}, which is no column of the table")
            if family not in FAMILIES:  # some other transformer
                continue
            item.user_properties.append(("conformance", [family, column, outcome]))
            if self.collected:
                self.count(family, column, outcome)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told: Any = dict(report.user_properties).get("conformance")
        if told is not None and not report.skipped and (report.when == "call" or report.failed):
            family, column, outcome = told
            self.count(family, column, outcome if report.passed else "failed")

    def count(self, family: str, column: str, outcome: str) -> None:
        self.cells.setdefault((family, column), Counter())[outcome] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.folder is None or hasattr(session.config, "workerinput"):
            return
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{transformers.__version__}.json"
        path.write_text(json.dumps(self.table(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> dict[str, Any]:
        """Versions, and by family and column how many tests had which outcome."""
        packages = {package.__name__: package.__version__.split("+")[0] for package in (transformers, nnsight, torch)}
        rows = {
            family: {
                column: {outcome: cell[outcome] for outcome in OUTCOMES if cell[outcome]}
                for column in COLUMNS
                if (cell := self.cells.get((family, column)))
            }
            for family in FAMILIES
        }
        return {"versions": packages, "families": {family: row for family, row in rows.items() if row}}
