"""Agreement: the verb has the number of its subject, whatever noun stands between them."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from .pairs import PromptPairs
from .task import Task, draw_pairs
from .texts import Record
from .words import choice, fill, listed, one_of, require, single_tokens

NOUNS = listed(
    "actor bird boat book bottle bridge brother cabinet car chair clock cup doctor dog door driver farm farmer flower "
    "friend garden guard hat horse house key king lake lamp lawyer letter mountain neighbor painting pilot player ring "
    "river road shirt shoe shop singer sister soldier star student table teacher tower tree truck wheel window writer"
)
"""Nouns with a plural in s."""
PREPOSITIONS = listed("near behind beside beyond opposite")
VERBS = {"is": "are", "was": "were", "has": "have", "does": "do", "seems": "seem", "looks": "look", "needs": "need"}
"""Verbs after a singular, with their form after a plural."""
NUMBERS = ("singular", "plural")
TEMPLATE = "The {subject} {preposition} the {attractor}"


def agreement(tokenizer: PreTrainedTokenizerBase, n_pairs: int, seed: int, *, attractor: str = "any") -> PromptPairs:
    """Pairs that differ in the number of the subject; the noun after it, the attractor, is the same in both.

    The answers are the verbs in the clean subject's number, the corrupt answers the same verbs in the other. Mark:
    ``subject``; the attractor is ``last``. Groups: ``number`` of the clean subject and ``attractor``, each
    ``singular`` or ``plural``. Metric: ``logit_diff``, the right verbs' mean logit less the wrong ones'.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.
        attractor: its number: ``"any"``, or as the clean subject's, ``"same"``, or not, ``"other"``.

    Raises:
        ValueError: if an option is not as it should be; or fewer than two nouns or than one verb are single tokens in
            both numbers.
    """
    attractor = one_of(attractor, "attractor", ("any", "same", "other"))
    known = single_tokens(tokenizer, [*NOUNS, *map(_plural, NOUNS)])
    nouns = [noun for noun in NOUNS if noun in known and _plural(noun) in known]
    require(nouns, 2, "the nouns with their plurals", NOUNS)
    forms = single_tokens(tokenizer, [*VERBS, *VERBS.values()])
    verbs = [(one, other) for one, other in VERBS.items() if one in forms and other in forms]
    require(verbs, 1, "the verbs in both numbers", VERBS)
    by_number = [[f" {verb}" for verb in column] for column in zip(*verbs, strict=True)]

    def draw(rng: random.Random) -> Record:
        number = choice(rng, (0, 1))
        beside = choice(rng, (0, 1)) if attractor == "any" else number if attractor == "same" else 1 - number
        subject = choice(rng, nouns)
        noun = choice(rng, [noun for noun in nouns if noun != subject])
        forms = subject, _plural(subject)
        parts = {"preposition": choice(rng, PREPOSITIONS), "attractor": (noun, _plural(noun))[beside]}
        clean, spans = fill(TEMPLATE, parts | {"subject": forms[number]})
        return {
            "clean": clean,
            "corrupt": fill(TEMPLATE, parts | {"subject": forms[1 - number]})[0],
            "answer": by_number[number],
            "corrupt_answer": by_number[1 - number],
            "marks": {"subject": spans["subject"]},
            "groups": {"number": NUMBERS[number], "attractor": NUMBERS[beside]},
        }

    return draw_pairs(tokenizer, n_pairs, seed, draw)


def _plural(noun: str) -> str:
    return f"{noun}s"


TASK = Task(
    name="agreement",
    about="the verb has the number of its subject, not that of the noun before it",
    function=agreement,
    source="arXiv 1611.01368; arXiv 2106.06087",
    example={
        "clean": "The wheels near the clocks",
        "corrupt": "The wheel near the clocks",
        "answer": [f" {verb}" for verb in VERBS.values()],
        "corrupt_answer": [f" {verb}" for verb in VERBS],
    },
)
