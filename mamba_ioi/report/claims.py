"""The paper's claims, and the figures that decide each: from stored results to verdicts, by explicit rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Any

from ..catalogue import CATALOGUE
from . import layers
from .evidence import Claim, Finding, Results

logger = logging.getLogger(__name__)

Rule = Callable[[Results, dict[str, Any] | None], Finding]
"""Reads one figure's result, and others that it needs; the paper's numbers are given for mamba-370m only."""


@dataclass(frozen=True)
class Question:
    """A claim of the paper before it is put to results.

    Attributes:
        key: names it in links.
        title: the claim, of any model.
        paper: what the paper says of mamba-370m.
    """

    key: str
    title: str
    paper: str

    @property
    def deciding(self) -> tuple[tuple[str, Rule], ...]:
        """The rules by the figure they read, from the catalogue; they say yes or no."""
        return self._rules("decides")

    @property
    def telling(self) -> tuple[tuple[str, Rule], ...]:
        """Rules that only add to the picture."""
        return self._rules("tells")

    def _rules(self, column: str) -> tuple[tuple[str, Rule], ...]:
        paths = {figure: getattr(row, column).get(self.key) for figure, row in CATALOGUE.items()}
        return tuple((figure, resolve_name(path)) for figure, path in paths.items() if path is not None)


QUESTIONS = (
    Question(
        "task",
        "The model does the task",
        "Accuracy on the templates is about 96 %, the answer's mean probability among the names 0.83 (Section 4.1.2).",
    ),
    Question(
        "bottleneck",
        "One layer is a bottleneck",
        "It is layer 39: by resample ablation and layer removal it matters most beside layer 0, and it is in every "
        "minimal set of layers that must move information between tokens (Section 4.1).",
    ),
    Question(
        "shift",
        "The bottleneck's convolution shifts names by one position",
        "Layer 39 takes names in through slice −1 of its convolution, so they reach its SSM one token later "
        "(Section 4.2).",
    ),
    Question(
        "linear",
        "Names are linear in the SSM, and can be steered",
        "Subtracting a name's mean and adding another's changes the answer more than 95 % of the time within the first "
        "three slots; those and the last two are less compatible (Section 4.3).",
    ),
    Question(
        "last",
        "The bottleneck writes at the last position only",
        "Only the last position of layer 39's output matters, and a circuit loses 1.4 points of accuracy without its "
        "edges from the others (Section 4.4).",
    ),
    Question(
        "circuit",
        "A small circuit does the task",
        "EAP finds 188 of 1225 edges with accuracy above 0.85; ACDC keeps 364 of 1609 with the layers' parts (App. D).",
    ),
)
"""The paper's claims; rows of the catalogue name them by their keys."""


def judge(results: Results, paper: dict[str, Any] | None = None) -> list[Claim]:
    """Put every claim to what results there are.

    Args:
        results: by figure.
        paper: `mamba_ioi.reference.numbers()` if the results are mamba-370m's.
    """

    def found(rules: Iterable[tuple[str, Rule]]) -> list[Finding]:
        return [_read(figure, rule, results, paper) for figure, rule in rules if figure in results]

    return [
        Claim(
            question.key,
            question.title,
            question.paper,
            (*found(question.deciding), *found(question.telling)),
            tuple(figure for figure, _ in (*question.deciding, *question.telling) if figure not in results),
        )
        for question in QUESTIONS
    ]


def _read(figure: str, rule: Rule, results: Results, paper: dict[str, Any] | None) -> Finding:
    """What the rule says, of the bottleneck; a result that was stored in another form loses its own sentence only.

    A figure that looks at another layer decides nothing, and the paper's numbers are not of that layer.
    """
    try:
        looked_at = results[figure].meta["arguments"].get("layer")
        if looked_at is None:
            return rule(results, paper)
        found = rule(results, paper if paper and looked_at == paper["bottleneck"] else None)
        bottleneck = layers.found_bottleneck(results)
        if looked_at == bottleneck:
            return found
        aside = (
            f" As this looks at layer {looked_at} and the bottleneck found is layer {bottleneck}, it decides nothing."
        )
        return replace(found, holds=None, sentence=found.sentence + aside)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        logger.debug("%s could not be read", figure, exc_info=error)
        return Finding(figure, None, f"Its stored result cannot be read ({type(error).__name__}: {error}).")
