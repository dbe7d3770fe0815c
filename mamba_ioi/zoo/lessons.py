"""What small models are trained on: the prompts of a task with their answers, drawn in batches, and what is measured.

A row is a whole prompt with its answer in the last column. All rows of a batch are of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..tasks.greater_than import CENTURIES, CORRUPT, EVENTS, TEMPLATE
from ..tasks.recall import divider_token, vocabularies
from ..tasks.words import beginning, fill, vocabulary
from .word_tokenizer import build_tokenizer, years_tokenizer

PAIRS, KEYS = 6, 32
"""Of recall: how many pairs a prompt has; how many words are keys, and how many are values."""
WORDS = 8
"""Of induction: how many words stand before the one that comes again: the task's own with ``before=3, between=3``."""
SPAN = 20
"""Of greater_than: how many years a span has at most in training."""
HELD_OUT_SHARE = 8
"""Of greater_than: one beginning of a span in so many is never trained on."""
GAPS = range(WORDS - 1)
"""Of induction: how many words stand between, where accuracy is measured."""
BEGINNINGS = ((2, 98), (2, 25), (26, 50), (51, 75), (76, 98))
"""Of greater_than: the beginnings, from and to, for each of which accuracy is measured."""

Tests = Mapping[str, tuple[Int[Tensor, "n L"], Int[Tensor, "n A"]]]
"""Rows by what they test, each with the tokens that are right, padded with -1."""


class Prompts(Protocol):
    """Draws the prompts of a task."""

    def batch(self, count: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Rows to train on."""
        ...

    def tests(self, count: int) -> Tests:
        """Rows to measure on, ``count`` of each kind, always the same."""
        ...


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A task as it is trained.

    Attributes:
        about: what is learned, for the card.
        made: what the model is for, a sentence of the card.
        data: what it is trained on, a sentence of the card.
        asked: how the prompts that are measured on are told apart, a phrase of the card, and the table's first head.
        decisive: the kind of test by which the task is learned or not, and how the card says it.
        chance: what guessing gives, a phrase of the card.
        numbers: what the report says of the prompts.
        tokenizer: makes the tokenizer.
        prompts: draws prompts with its tokens.
        steps: how many, by family; of the packaged models where there are such.
    """

    about: str
    made: str
    data: str
    asked: tuple[str, str]
    decisive: tuple[str, str]
    chance: str
    numbers: Mapping[str, int]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    prompts: Callable[[PreTrainedTokenizerFast], Prompts]
    steps: Mapping[str, int]


class RecallPrompts:
    """Prompts ``BOS k1 v1 … EOS kq vq`` with keys and values drawn without replacement (arXiv 2505.15105)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        keys, values = vocabularies(tokenizer)
        self.keys, self.values = torch.tensor(keys), torch.tensor(values)
        self.front, self.divider = beginning(tokenizer)[0], divider_token(tokenizer)

    def draw(self, count: int, pairs: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Rows of so many pairs."""
        both = torch.stack([_drawn(one, count, pairs, generator) for one in (self.keys, self.values)], dim=2)
        asked = torch.rand(count, pairs, generator=generator).argsort(1)[:, 0]
        front, divider = torch.full((count, 1), self.front), torch.full((count, 1), self.divider)
        return torch.cat([front, both.flatten(1), divider, both[torch.arange(count), asked]], dim=1)

    def batch(self, count: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Rows of 6 pairs."""
        return self.draw(count, PAIRS, generator)

    def tests(self, count: int) -> Tests:
        """By the number of pairs, up to two more than were trained on."""
        rows = {pairs: self.draw(count, pairs, _seeded(pairs)) for pairs in range(1, PAIRS + 3)}
        return {str(pairs): (some, some[:, -1:]) for pairs, some in rows.items()}


class InductionPrompts:
    """Prompts ``BOS … A B … A B`` of 8 different words, any of which but the last comes again: no place tells it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.words = torch.tensor(list(vocabulary(tokenizer, WORDS).values()))
        self.front = beginning(tokenizer)[0]

    def draw(self, count: int, first: Int[Tensor, "B"], generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Rows in which the word of that number, from 0, comes again."""
        words = _drawn(self.words, count, WORDS, generator)
        again = words.gather(1, torch.stack([first, first + 1], dim=1))
        return torch.cat([torch.full((count, 1), self.front), words, again], dim=1)

    def batch(self, count: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Rows in which each word comes again as often as another."""
        return self.draw(count, torch.randint(WORDS - 1, (count,), generator=generator), generator)

    def tests(self, count: int) -> Tests:
        """By how many words stand between B and the second A."""
        rows = {gap: self.draw(count, torch.full((count,), WORDS - 2 - gap), _seeded(gap)) for gap in GAPS}
        return {str(gap): (some, some[:, -1:]) for gap, some in rows.items()}


class YearPrompts:
    """Spans of years that end 1 to 20 years after they began, in the same century."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        def ids(words: tuple[str, ...], space: str) -> Int[Tensor, "W"]:
            return torch.tensor([token for (token,) in tokenizer([f"{space}{word}" for word in words])["input_ids"]])

        self.events, self.centuries = ids(EVENTS, " "), ids(CENTURIES, " ")
        self.years = ids(tuple(f"{year:02d}" for year in range(100)), "")
        parts = {"event": EVENTS[0], "xx": CENTURIES[0], "yy": "99", "end": CENTURIES[0]}
        self.form = torch.tensor([*beginning(tokenizer), *tokenizer(fill(TEMPLATE, parts)[0])["input_ids"]])
        event, years, centuries = (
            (self.form == token).nonzero().flatten() for token in (self.events[0], self.years[99], self.centuries[0])
        )
        self.places = [int(event), *centuries.tolist(), int(years)]
        kinds = torch.cartesian_prod(*map(torch.arange, (len(EVENTS), len(CENTURIES), 99)))
        kinds = kinds[kinds[:, 2] > CORRUPT]
        held = (kinds * torch.tensor([7919, 104729, 1299709])).sum(1) % 2147483647 % HELD_OUT_SHARE == 0
        self.trained, self.held_out = kinds[~held], kinds[held]

    def draw(self, kinds: Int[Tensor, "K 3"], count: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Rows of these kinds: event, century and year of the beginning, by their numbers."""
        event, century, year = kinds[torch.randint(len(kinds), (count,), generator=generator)].unbind(1)
        most = (99 - year).clamp(max=SPAN)
        end = year + 1 + (torch.rand(count, generator=generator) * most).long()
        rows = self.form.repeat(count, 1)
        century = self.centuries[century]
        for place, column in zip(self.places, (self.events[event], century, century, self.years[year]), strict=True):
            rows[:, place] = column
        return torch.cat([rows, self.years[end][:, None]], dim=1)

    def batch(self, count: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Rows none of which is held out."""
        return self.draw(self.trained, count, generator)

    def tests(self, count: int) -> Tests:
        """By the year of the beginning, of those that are held out; right is what a span in training can end with."""
        found = {}
        for number, (least, most) in enumerate(BEGINNINGS):
            year = self.held_out[:, 2]
            rows = self.draw(self.held_out[(year >= least) & (year <= most)], count, _seeded(number))
            first = rows[:, self.places[-1]][:, None] - self.years[0] + 1  # the tokens of years stand in order
            after = first + torch.arange(SPAN)
            found[f"{least:02d} to {most}"] = rows, (after + self.years[0]).where(after <= 99, -1)
        return found


def _drawn(words: Int[Tensor, "W"], count: int, each: int, generator: torch.Generator) -> Int[Tensor, "B each"]:
    """Words without replacement, row by row."""
    return words[torch.rand(count, len(words), generator=generator).argsort(1)[:, :each]]


def _seeded(number: int) -> torch.Generator:
    """Random numbers for a test."""
    return torch.Generator().manual_seed(1000 + number)


LESSONS: Mapping[str, Lesson] = {
    "recall": Lesson(
        about="associative recall",
        made="A subject of mamba_ioi's recall study (the task and the question are those of arXiv 2505.15105).",
        data=f"`BOS k1 v1 … k{PAIRS} v{PAIRS} EOS kq`, which vq continues; {KEYS} keys and {KEYS} values,\n"
        "  drawn without replacement.",
        asked=("number of pairs (it was trained on 6 alone)", "pairs"),
        decisive=(str(PAIRS), f"at {PAIRS} pairs"),
        chance=f"chance among a prompt's values is {1 / PAIRS:.4f}",
        numbers={"pairs": PAIRS, "keys": KEYS, "values": KEYS},
        tokenizer=lambda: build_tokenizer(KEYS),
        prompts=RecallPrompts,
        steps={"mamba": 4000, "mamba-noconv": 4000, "mamba2": 2500, "attention": 5000},
    ),
    "induction": Lesson(
        about="induction",
        made="A subject of mamba_ioi's wider check (docs/tasks.md).",
        data=f"`BOS … A B … A`, which B continues; {WORDS} different words of {2 * KEYS}, any of which\n"
        "  but the last comes again.",
        asked=("number of words between B and the second A", "words between"),
        decisive=("3", "with 3 words between"),
        chance=f"chance among a prompt's words is {1 / WORDS:.4f}",
        numbers={"words": WORDS, "of": 2 * KEYS},
        tokenizer=lambda: build_tokenizer(KEYS),
        prompts=InductionPrompts,
        steps=dict.fromkeys(("mamba", "mamba-noconv", "mamba2", "attention"), 4000),
    ),
    "greater_than": Lesson(
        about="greater-than",
        made="A subject of mamba_ioi's wider check (docs/tasks.md).",
        data=f"`{TEMPLATE.format(event='war', xx='17', yy='42', end='17')}`, which 43 to 62 continue: spans end\n"
        f"  1 to {SPAN} years after they began; one beginning (event, century and year) in {HELD_OUT_SHARE} was never\n"
        "  trained on.",
        asked=("range of the year of the beginning, of those that were held out", "the span begins in"),
        decisive=("02 to 98", "over all beginnings"),
        chance=f"one year for all of them is right in {SPAN / 97:.4f}",
        numbers={"span": SPAN},
        tokenizer=years_tokenizer,
        prompts=YearPrompts,
        steps=dict.fromkeys(("mamba", "mamba-noconv", "mamba2", "attention"), 1000),
    ),
}
"""The lessons by the tasks' names."""
