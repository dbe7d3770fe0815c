"""What a report is made of: numbers with their intervals, findings read off one figure, and claims that they decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..catalogue import EVERY
from ..result import Result

Results = Mapping[str, Result]
"""Stored results by the figure's id."""
NO_VALUE = "–"


@dataclass(frozen=True)
class Setting:
    """What rules know besides the results, and how they speak of the pairs.

    Attributes:
        paper: the paper's numbers, where the results are of its model and its pairs.
        bottleneck: the layer that the folder's figures look at; None where none is known.
        own: whether the pairs are the paper's; else no sentence speaks of names or corruptions.
        metric: what effects are of.
        held_out: whether circuits are judged on other pairs than those that they were found on.
    """

    paper: dict[str, Any] | None = None
    bottleneck: int | None = None
    own: bool = True
    metric: str = "nld"
    held_out: bool = True

    @property
    def kind(self) -> str:
        """What the pairs of one panel have in common."""
        return "corruption" if self.own else "kind of pairs"

    def kinds(self, count: int) -> str:
        """``5 corruptions``."""
        return plural(count, self.kind, None if self.own else "kinds of pairs")

    @property
    def normalized(self) -> bool:
        """Whether 1 is the whole way to the corrupt prompt, so that effects can be held against thresholds."""
        return self.metric == "nld"

    @property
    def measure(self) -> str:
        """The metric's name in a sentence."""
        return "NLD" if self.normalized else self.metric

    def moves(self, value: str) -> str:
        """What an effect says: ``moves the answer 0.900 of the way``."""
        return f"moves the answer {value} of the way" if self.normalized else f"lowers {self.metric} by {value}"

    def doubt(self, result: Result) -> str:
        """Why a table of effects decides nothing, in a sentence: its metric, or that it is by marks; else empty."""
        if not self.normalized:
            return f" As effects are of {self.metric}, for which no threshold is known, this decides nothing."
        return "" if "mark" not in result.table else " By marks only some places are looked at: this decides nothing."

    @property
    def judged_on(self) -> str:
        """The pairs that a circuit is judged on."""
        return "held-out pairs" if self.held_out else "the pairs that it was found on"


def of_own_pairs(result: Result) -> bool:
    """Whether a result is of the paper's pairs."""
    request = result.meta.get("request")
    return not isinstance(request, dict) or not (request.get("data") or request.get("task"))


def by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """A table of effects with columns ``kind``, its first group's labels, and ``place``, a label or a mark."""
    table = table.rename(columns={table.columns[0]: "kind"})
    return table.assign(place=table["label" if "label" in table else "mark"])


def shown(value: float | int | None) -> str:
    """A number as the report writes it: whole numbers as they are, others with three decimals."""
    if value is None or math.isnan(value):
        return NO_VALUE
    text = str(int(value)) if isinstance(value, int) or hasattr(value, "bit_count") else f"{value:.3f}"
    return "0.000" if text == "-0.000" else text.replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """``[0.123, 0.456]``; empty where there is none."""
    return "" if low is None or high is None or math.isnan(low) else f"[{shown(low)}, {shown(high)}]"


@dataclass(frozen=True)
class Number:
    """One measured number.

    Attributes:
        what: what it is of.
        value: whole numbers are counts.
        low: where its bootstrap 95 % interval begins; None where there is none.
        high: where it ends.
        n: over how many prompts, or what else ``what`` says; None where that has no meaning.
        paper: the paper's number for mamba-370m, where the model is that and the paper has one.
    """

    what: str
    value: float | int
    low: float | None = None
    high: float | None = None
    n: int | None = None
    paper: float | int | None = None

    @property
    def text(self) -> str:
        """The value as written."""
        return shown(self.value)

    @property
    def with_interval(self) -> str:
        """The value, and its interval where there is one."""
        return " ".join(filter(None, (self.text, interval(self.low, self.high))))

    @property
    def difference(self) -> str:
        """Ours less the paper's, with its sign; empty without the paper's."""
        if self.paper is None:
            return ""
        if math.isnan(self.value):
            return NO_VALUE
        difference = self.value - self.paper
        text = shown(difference)
        return f"+{text}" if difference > 0 and text.strip("0.") else text


@dataclass(frozen=True)
class Table:
    """Rows of texts under a caption."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number_table(numbers: tuple[Number, ...], caption: str) -> Table:
    """The numbers as a table; columns that would be empty are left out."""
    columns = {
        "": [number.what for number in numbers],
        "value": [number.text for number in numbers],
        "95 % interval": [interval(number.low, number.high) for number in numbers],
        "n": ["" if number.n is None else shown(number.n) for number in numbers],
        "paper": ["" if number.paper is None else shown(number.paper) for number in numbers],
        "difference": [number.difference for number in numbers],
    }
    kept = {name: cells for name, cells in columns.items() if not name or any(cells)}
    return Table(caption, tuple(kept), tuple(zip(*kept.values(), strict=True)))


@dataclass(frozen=True)
class Finding:
    """What one figure's table says.

    Attributes:
        figure: whose result it was read from.
        holds: whether it bears the claim out; None where it decides nothing.
        sentence: what was found.
        rule: how ``holds`` was decided.
        numbers: what the sentence rests on.
        more: further numbers, which are folded away on screens.
        tables: comparisons with the authors' edges.
    """

    figure: str
    holds: bool | None
    sentence: str
    rule: str = ""
    numbers: tuple[Number, ...] = ()
    more: tuple[Number, ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def label(self) -> str:
        """The paper's name of the figure."""
        return EVERY[self.figure].label


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what a model's results say of it.

    Attributes:
        key: names it in links.
        title: the claim.
        paper: what the paper says of mamba-370m.
        findings: in the order of the paper.
        missing: figures whose results would decide, too, and are not there.
    """

    key: str
    title: str
    paper: str
    findings: tuple[Finding, ...]
    missing: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``holds``, ``holds in part``, ``does not hold`` or ``not measured``."""
        said = [finding.holds for finding in self.findings if finding.holds is not None]
        if not said:
            return "not measured"
        return "holds" if all(said) else "holds in part" if any(said) else "does not hold"

    @property
    def grounds(self) -> str:
        """Which figures say so, which do not, and which are missing."""
        sides = (
            ("for it", [finding.label for finding in self.findings if finding.holds]),
            ("against it", [finding.label for finding in self.findings if finding.holds is False]),
            ("not there", [EVERY[figure].label for figure in self.missing]),
        )
        return "; ".join(f"{side}: {', '.join(labels)}" for side, labels in sides if labels)


def plural(count: int, one: str, more: str | None = None) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""
