"""Docstring: a Python function documents its arguments in their order; which comes next?"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from .pairs import PromptPairs
from .task import Task, draw_pairs
from .texts import Record
from .words import choice, fill, listed, require, sample, single_tokens

ARGUMENTS = listed(
    "path size name value key data text file list item count index start end step mode type width height color label "
    "title line word user group date time year month level limit score rate state status source target result output "
    "input query table field node parent image video model weight shape depth speed angle port host token code format "
    "style theme"
)
FUNCTIONS = listed("build check clean close copy draw find join load merge move open parse read send sort split")
SUBJECTS = listed(
    "river stone winter music bread garden silver forest letter market ocean summer castle bridge island coffee candle "
    "horse paper thunder"
)
TEMPLATE = '''def {function}(self, {before}, {first}, {second}, {third}, {after}):
    """The {about} of the {thing}.

    :param {first_doc}: {one} {two}
    :param {second_doc}: {three} {four}
    :param'''
_PLACES = ("before", "first", "second", "third", "after")
_SUBJECTS = ("about", "thing", "one", "two", "three", "four")


def docstring(tokenizer: PreTrainedTokenizerBase, n_pairs: int, seed: int) -> PromptPairs:
    """Pairs of functions with two documented arguments, of which the third is due; the corrupt one has other arguments.

    Both have five arguments besides ``self``, of which the second, third and fourth are documented in their order.
    Function and descriptions are the same in both. Marks: ``before``, ``first``, ``second``, ``third``, ``after`` (the
    arguments), ``first_doc`` and ``second_doc`` (where they are documented). Candidates: the arguments of both. Metric:
    ``margin``, the right argument's logit less that of the best other one.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.

    Raises:
        ValueError: if fewer than ten of the arguments' names are single tokens.
    """
    names = list(single_tokens(tokenizer, ARGUMENTS))
    require(names, 2 * len(_PLACES), "the names of arguments", ARGUMENTS)

    def draw(rng: random.Random) -> Record:
        drawn = sample(rng, names, 2 * len(_PLACES))
        words = dict(zip(_SUBJECTS, sample(rng, SUBJECTS, len(_SUBJECTS)), strict=True))
        words |= {"function": choice(rng, FUNCTIONS)}
        sides = [dict(zip(_PLACES, side, strict=True)) for side in (drawn[:5], drawn[5:])]
        (clean, spans), (corrupt, _) = (
            fill(TEMPLATE, words | side | {"first_doc": side["first"], "second_doc": side["second"]}) for side in sides
        )
        return {
            "clean": clean,
            "corrupt": corrupt,
            "answer": f" {sides[0]['third']}",
            "corrupt_answer": f" {sides[1]['third']}",
            "candidates": [f" {name}" for name in drawn],
            "marks": {name: spans[name] for name in (*_PLACES, "first_doc", "second_doc")},
        }

    return draw_pairs(tokenizer, n_pairs, seed, draw, metric="margin")


TASK = Task(
    name="docstring",
    about="a function documents its arguments in their order: the one that is due",
    function=docstring,
    source="ACDC, arXiv 2304.14997",
    example={
        "clean": """def send(self, output, field, format, index, value):
    \"""The paper of the market.

    :param field: stone horse
    :param format: summer winter
    :param""",
        "corrupt": """def send(self, shape, label, word, weight, count):
    \"""The paper of the market.

    :param label: stone horse
    :param word: summer winter
    :param""",
        "answer": " index",
        "corrupt_answer": " weight",
    },
)
