"""The paper's claims, and the figures that decide each: from stored results to verdicts, by explicit rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Any

from ..catalogue import EVERY
from ..result import Result
from .evidence import Claim, Finding, Results, Setting, of_own_pairs

logger = logging.getLogger(__name__)

Rule = Callable[[Results, Setting], Finding]
"""Reads one figure's result, and others that it needs."""
LOOKING = ("fig8", "fig9", "sec44", "fig7", "fig9_pca", "flow")
"""Figures whose results name the layer that they looked at: the bottleneck, where no record says which that is."""


@dataclass(frozen=True)
class Question:
    """A claim of the paper before it is put to results.

    Attributes:
        key: names it in links.
        title: the claim, of any model on the paper's pairs.
        paper: what the paper says of mamba-370m.
        anywhere: the claim, of any model on any pairs; None where it is about the names in the paper's prompts.
    """

    key: str
    title: str
    paper: str
    anywhere: str | None

    @property
    def deciding(self) -> tuple[tuple[str, Rule], ...]:
        """The rules by the figure they read, from the catalogue; they say yes or no."""
        return self._rules("decides")

    @property
    def telling(self) -> tuple[tuple[str, Rule], ...]:
        """Rules that only add to the picture."""
        return self._rules("tells")

    def _rules(self, column: str) -> tuple[tuple[str, Rule], ...]:
        paths = {figure: getattr(row, column).get(self.key) for figure, row in EVERY.items()}
        return tuple((figure, resolve_name(path)) for figure, path in paths.items() if path is not None)


QUESTIONS = (
    Question(
        "task",
        "The model does the task",
        "Accuracy on the templates is about 96 %, the answer's mean probability among the names 0.83 (Section 4.1.2).",
        "The model does the task",
    ),
    Question(
        "bottleneck",
        "One layer is a bottleneck",
        "It is layer 39: by resample ablation and layer removal it matters most beside layer 0, and it is in every "
        "minimal set of layers that must move information between tokens (Section 4.1).",
        "One layer is a bottleneck",
    ),
    Question(
        "shift",
        "The bottleneck's convolution shifts names by one position",
        "Layer 39 takes names in through slice −1 of its convolution, so they reach its SSM one token later "
        "(Section 4.2).",
        "The bottleneck's convolution shifts what it reads by one position",
    ),
    Question(
        "linear",
        "Names are linear in the SSM, and can be steered",
        "Subtracting a name's mean and adding another's changes the answer more than 95 % of the time within the first "
        "three slots; those and the last two are less compatible (Section 4.3).",
        None,
    ),
    Question(
        "slots",
        "The bottleneck keeps the first three names with their slots",
        "Whether names are stored without their position, or a wrong position is repaired later, is left open "
        "(Section 6).",
        None,
    ),
    Question(
        "last",
        "The bottleneck writes at the last position only",
        "Only the last position of layer 39's output matters, and a circuit loses 1.4 points of accuracy without its "
        "edges from the others (Section 4.4).",
        "The bottleneck writes at the last position only",
    ),
    Question(
        "exchange",
        "Tokens pass the answer on at the bottleneck, not before it",
        "What tokens give each other before layer 39 is left open (Section 6).",
        "Tokens pass the answer on at the bottleneck, not before it",
    ),
    Question(
        "later",
        "Layers after the bottleneck write the answer too",
        "What the layers after 39 do is left open (Section 6).",
        "Layers after the bottleneck write the answer too",
    ),
    Question(
        "dictionary",
        "A small part of the bottleneck's features does the task",
        "Which features the circuit is made of is left to sparse autoencoders (Section 6).",
        "A small part of the bottleneck's features does the task",
    ),
    Question(
        "circuit",
        "A small circuit does the task",
        "EAP finds 188 of 1225 edges with accuracy above 0.85; ACDC keeps 364 of 1609 with the layers' parts (App. D).",
        "A small circuit does the task",
    ),
)
"""The paper's claims; rows of the catalogue name them by their keys."""


def judge(
    results: Results,
    paper: dict[str, Any] | None = None,
    bottleneck: int | None = None,
    questions: Sequence[Question] = QUESTIONS,
) -> list[Claim]:
    """Put every claim to what results there are; of another task's pairs, the claims that are about no names.

    Args:
        results: by figure.
        paper: `mamba_ioi.reference.numbers()` if the results are mamba-370m's on the paper's pairs.
        bottleneck: the layer that is recorded as the bottleneck; None takes the one that the results looked at.
        questions: the claims; a study has its own.
    """
    setting = setting_of(results, paper, bottleneck)
    asked = [(question, question.title if setting.own else question.anywhere) for question in questions]
    claims = []
    for question, title in asked:
        if title is None:
            continue
        rules = [*question.deciding, *question.telling]
        missing = [
            figure for figure, _ in rules if figure not in results and (setting.own or not EVERY[figure].needs_names)
        ]
        findings = tuple(_read(figure, rule, results, setting) for figure, rule in rules if figure in results)
        claims.append(Claim(question.key, title, question.paper if setting.own else "", findings, tuple(missing)))
    return claims


def setting_of(results: Results, paper: dict[str, Any] | None = None, bottleneck: int | None = None) -> Setting:
    """What the rules know besides the results, from what the results say of themselves."""
    if bottleneck is None:
        looked_at = (_argument(results[figure], "layer") for figure in LOOKING if figure in results)
        bottleneck = next((int(layer) for layer in looked_at if layer is not None), None)
    metrics = (
        _argument(results[figure], "metric") for figure in ("fig4", "fig8", "fig10", "fig11") if figure in results
    )
    known = [result.meta.get("circuit") for result in results.values()]
    judged = [one for one in known if isinstance(one, dict)]
    held_out = all("held_out" in one for one in judged)
    if "sec44" in results:
        held_out = held_out and results["sec44"].meta.get("judged_on", "held_out") == "held_out"
    return Setting(
        paper,
        bottleneck,
        all(map(of_own_pairs, results.values())),
        next((metric for metric in metrics if metric), "nld"),
        held_out,
    )


def _argument(result: Result, name: str) -> Any:
    arguments = result.meta.get("arguments")
    return arguments.get(name) if isinstance(arguments, dict) else None


def _read(figure: str, rule: Rule, results: Results, setting: Setting) -> Finding:
    """What the rule says, of the bottleneck; a result that was stored in another form loses its own sentence only.

    A figure that looks at another layer decides nothing, and the paper's numbers are not of that layer.
    """
    try:
        looked_at, paper = results[figure].meta["arguments"].get("layer"), setting.paper
        if looked_at is None:
            return rule(results, setting)
        found = rule(results, replace(setting, paper=paper if paper and looked_at == paper["bottleneck"] else None))
        if looked_at == setting.bottleneck:
            return found
        aside = (
            f" As this looks at layer {looked_at} and the bottleneck found is layer {setting.bottleneck}, it decides "
            f"nothing."
        )
        return replace(found, holds=None, sentence=found.sentence + aside)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        logger.debug("%s could not be read", figure, exc_info=error)
        return Finding(figure, None, f"Its stored result cannot be read ({type(error).__name__}: {error}).")
