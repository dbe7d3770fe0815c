"""Greater-than: a span of years ends after it began, so the end's two digits are greater than the beginning's."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from .pairs import PromptPairs
from .task import Task, draw_pairs
from .texts import Record
from .words import choice, fill, listed

EVENTS = listed(
    "alliance boom campaign conflict contract crisis custom debate dispute drought dynasty empire exhibition "
    "expedition famine festival feud journey lease occupation partnership peace plague project reign revolt search "
    "season siege strike study survey tour treaty trial union voyage war"
)
TEMPLATE = "The {event} went on from the year {xx}{yy} to the year {end}"
CENTURIES = tuple(map(str, range(11, 21)))
CORRUPT = 1
"""The two digits in the corrupt prompt, after which nearly every year comes."""
_LEAST = 50


def greater_than(tokenizer: PreTrainedTokenizerBase, n_pairs: int, seed: int) -> PromptPairs:
    """Pairs whose beginnings are the years XXYY and XX01, of one century.

    The answers are the two-digit tokens greater than YY, the corrupt answers the others, as they follow XX. Centuries
    are those in which the tokenizer splits most years into XX and YY (GPT-NeoX's: from 1700 to 1799, all of them).
    Marks: ``event``, ``xx`` and ``yy`` (the beginning's two tokens); ``last`` is the end's XX. Metric: ``prob_diff``,
    the sum of p(y) for y > YY less that for y <= YY (arXiv 2305.00586).

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.

    Raises:
        ValueError: if the tokenizer splits fewer than half of the years of every century so.
    """
    follow = two_digits(tokenizer)
    most = max(map(len, follow.values()))
    centuries = [century for century, found in follow.items() if len(found) == most and CORRUPT in found]
    if most < _LEAST or not centuries:
        raise ValueError(
            f"the tokenizer lacks tokens of two digits after a century, as 42 after 17: of the years of a century it "
            f"splits {most} so, and {_LEAST} are needed, among them the year 01"
        )

    def draw(rng: random.Random) -> Record:
        century = choice(rng, centuries)
        digits = follow[century]
        year = choice(rng, [y for y in digits if CORRUPT < y < digits[-1]])
        parts = {"event": choice(rng, EVENTS), "xx": century, "yy": f"{year:02d}", "end": century}
        clean, spans = fill(TEMPLATE, parts)
        return {
            "clean": clean,
            "corrupt": fill(TEMPLATE, parts | {"yy": f"{CORRUPT:02d}"})[0],
            "answer": [f"{y:02d}" for y in digits if y > year],
            "corrupt_answer": [f"{y:02d}" for y in digits if y <= year],
            "marks": {name: spans[name] for name in ("event", "xx", "yy")},
        }

    return draw_pairs(tokenizer, n_pairs, seed, draw, metric="prob_diff")


def two_digits(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """For each century, ``"11"`` to ``"20"``, the numbers YY whose year XXYY is a token for XX and one for YY."""
    found = {}
    for century in CENTURIES:
        (before,) = tokenizer([f"year {century}"], add_special_tokens=False)["input_ids"]
        years = tokenizer([f"year {century}{y:02d}" for y in range(100)], add_special_tokens=False)["input_ids"]
        unknown = tokenizer.unk_token_id
        found[century] = [y for y, ids in enumerate(years) if ids[:-1] == before and ids[-1] != unknown]
    return found


TASK = Task(
    name="greater_than",
    about="a span of years ends after it began: two digits greater than those that it began with",
    function=greater_than,
    source="arXiv 2305.00586; ACDC, arXiv 2304.14997",
    example={
        "clean": "The voyage went on from the year 1770 to the year 17",
        "corrupt": "The voyage went on from the year 1701 to the year 17",
        "answer": [f"{y:02d}" for y in range(71, 100)],
        "corrupt_answer": [f"{y:02d}" for y in range(71)],
    },
)
