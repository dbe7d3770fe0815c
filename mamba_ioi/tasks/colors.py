"""Colors: objects are said to have colors; which color has one of them?"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from ..checks import whole_number
from .pairs import PromptPairs
from .task import Task, draw_pairs
from .texts import Record
from .words import choice, fill, listed, require, sample, single_tokens

COLORS = listed("black blue brown gold gray green orange pink purple red silver tan violet white yellow")
OBJECTS = listed(
    "bag ball balloon basket bike blanket boat book bottle bowl box candle cap car carpet chair clock coat cup desk "
    "door flower hat jacket key lamp leaf mug pen phone pillow plate ring shirt sofa table towel truck umbrella"
)
STATEMENT = "The {object} is {color}."
QUESTION = "What color is the {asked}? It is"


def colors(tokenizer: PreTrainedTokenizerBase, n_pairs: int, seed: int, *, objects: int = 3) -> PromptPairs:
    """Pairs of lists of colored objects, in which the object that is asked for changes its color with another one.

    Marks: ``object`` and ``color`` (of the one that is asked for, in the list), ``other_color`` (with which it
    changes), ``asked`` (the object in the question). Group: ``asked``, which of the objects is asked for, from 1.
    Candidates: the colors of the list. Metric: ``logit_diff``.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.
        objects: how many objects the list has.

    Raises:
        ValueError: if the number of objects is not as it should be, or more than the tokenizer has as single tokens.
    """
    objects = whole_number(objects, "objects", least=2, most=len(COLORS))
    shades, things = list(single_tokens(tokenizer, COLORS)), list(single_tokens(tokenizer, OBJECTS))
    require(shades, objects, "the colors", COLORS)
    require(things, objects, "the objects", OBJECTS)
    said = [STATEMENT.format(object=f"{{object{i}}}", color=f"{{color{i}}}") for i in range(objects)]
    template = " ".join([*said, QUESTION])

    def draw(rng: random.Random) -> Record:
        listed, shade = sample(rng, things, objects), sample(rng, shades, objects)
        asked = choice(rng, range(objects))
        other = choice(rng, [i for i in range(objects) if i != asked])
        changed = list(shade)
        changed[asked], changed[other] = shade[other], shade[asked]
        parts = {f"object{i}": thing for i, thing in enumerate(listed)} | {"asked": listed[asked]}
        (clean, spans), (corrupt, _) = (
            fill(template, parts | {f"color{i}": one for i, one in enumerate(side)}) for side in (shade, changed)
        )
        places = {"object": f"object{asked}", "color": f"color{asked}", "other_color": f"color{other}"}
        return {
            "clean": clean,
            "corrupt": corrupt,
            "answer": f" {shade[asked]}",
            "corrupt_answer": f" {shade[other]}",
            "candidates": [f" {one}" for one in shade],
            "marks": {name: spans[place] for name, place in places.items()} | {"asked": spans["asked"]},
            "groups": {"asked": asked + 1},
        }

    return draw_pairs(tokenizer, n_pairs, seed, draw)


TASK = Task(
    name="colors",
    about="objects in a list have colors: that of the one that is asked for",
    function=colors,
    source="arXiv 2310.08744; MIB, arXiv 2504.13151",
    example={
        "clean": "The lamp is brown. The mug is black. The truck is violet. What color is the lamp? It is",
        "corrupt": "The lamp is black. The mug is brown. The truck is violet. What color is the lamp? It is",
        "answer": " brown",
        "corrupt_answer": " black",
    },
)
