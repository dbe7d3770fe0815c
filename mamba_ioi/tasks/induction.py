"""Induction: what followed a word the first time follows it again."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from ..checks import whole_number
from .pairs import PromptPairs
from .task import Task, draw_pairs
from .texts import Record
from .words import beginning, require, sample, vocabulary


def induction(
    tokenizer: PreTrainedTokenizerBase, n_pairs: int, seed: int, *, before: int = 8, between: int = 8
) -> PromptPairs:
    """Pairs ``BOS … A B … A`` and ``BOS … A B′ … A``, in which B and B′ are right; no other word comes twice.

    Words are drawn without replacement (see `vocabulary`), and prompts are made of token ids. All rows have their words
    at the same positions. Marks: ``a`` and ``b`` (the first A, and B); ``last`` is the second A. Candidates: the words
    of both prompts. Metric: ``logit_diff``, B less B′.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.
        before: how many words stand before the first A.
        between: how many words stand between B and the second A.

    Raises:
        ValueError: if the vocabulary has too few words, or a number is no whole number.
    """
    before, between = whole_number(before, "before", least=0), whole_number(between, "between", least=0)
    needed = before + between + 3
    front, words = beginning(tokenizer), vocabulary(tokenizer, needed)
    require(words, needed, "words of four letters or more")
    first, tokens = len(front) + before, list(words.values())

    def draw(rng: random.Random) -> Record:
        a, b, other, *rest = sample(rng, tokens, needed)
        clean, corrupt = (front + rest[:before] + [a, one] + rest[before:] + [a] for one in (b, other))
        return {
            "clean_tokens": clean,
            "corrupt_tokens": corrupt,
            "last_position": len(clean) - 1,
            "answer_tokens": b,
            "corrupt_answer_tokens": other,
            "candidate_tokens": [b, other, a, *rest],
            "marks": {"a": first, "b": first + 1},
        }

    return draw_pairs(tokenizer, n_pairs, seed, draw)


TASK = Task(
    name="induction",
    about="a word of a random sequence comes again: what followed it the first time follows again",
    function=induction,
    source="arXiv 2209.11895; ACDC, arXiv 2304.14997",
    example={
        "clean": " Beth store Riley Edmund Frances Ralph Ashley Stuart Lucy Matt Jason went Susan Karen arrived "
        "Robin Nicole Mitchell Lucy",
        "corrupt": " Beth store Riley Edmund Frances Ralph Ashley Stuart Lucy Vernon Jason went Susan Karen arrived "
        "Robin Nicole Mitchell Lucy",
        "answer": " Matt",
        "corrupt_answer": " Vernon",
    },
)
