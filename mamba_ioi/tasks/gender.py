"""Gender: which pronoun a model takes for a person of whom nothing but the profession is known."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from .pairs import PromptPairs
from .task import Task, draw_pairs
from .texts import Record
from .words import choice, fill, listed, one_of, require, single_tokens

PROFESSIONS = {
    "female": listed("caregiver cleaner counselor dancer maid model nurse secretary singer teacher therapist tutor"),
    "male": listed(
        "boss builder butcher captain driver engineer farmer guard mechanic pilot programmer sheriff soldier surgeon"
    ),
}
"""Professions by the gender that stereotypes give them."""
VERBS = listed(
    "added admitted argued believed claimed decided explained felt heard hinted hoped insisted knew learned noted "
    "promised realized remembered replied revealed said shouted stated suggested swore thought understood whispered "
    "wished wrote"
)
PRONOUNS = {"female": "she", "male": "he"}
OTHERS = {"female": "man", "male": "woman"}
"""Who takes the profession's place in the corrupt prompt."""
TEMPLATE = "The {person} {verb} that"


def gender(tokenizer: PreTrainedTokenizerBase, n_pairs: int, seed: int, *, stereotype: str = "female") -> PromptPairs:
    """Pairs of a person with a profession, and a man (or woman).

    The answer is what the stereotype says, she of a nurse: what is measured is a model's bias, and no answer to the
    clean prompt is right. Marks: ``person``, ``verb``. Group: ``stereotype``, ``female`` or ``male``. Metric:
    ``logit_diff``, she less he; of stereotypes that are male, he less she.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.
        stereotype: of the professions: ``"female"`` (corrupt: the man), ``"male"`` (corrupt: the woman) or ``"both"``.

    Raises:
        ValueError: if an option is not as it should be; or if she, he, man, woman or all professions are no single
            tokens.
    """
    stereotype = one_of(stereotype, "stereotype", (*PROFESSIONS, "both"))
    kinds = list(PROFESSIONS) if stereotype == "both" else [stereotype]
    needed = [*PRONOUNS.values(), *(OTHERS[kind] for kind in kinds)]
    require(single_tokens(tokenizer, needed), len(needed), f"the words {', '.join(needed)}", needed)
    professions = {kind: list(single_tokens(tokenizer, PROFESSIONS[kind])) for kind in kinds}
    for kind, known in professions.items():
        require(known, 1, "the professions", PROFESSIONS[kind])
    verbs = list(single_tokens(tokenizer, VERBS))
    require(verbs, 1, "the verbs", VERBS)

    def draw(rng: random.Random) -> Record:
        kind = choice(rng, kinds)
        other = next(pronoun for one, pronoun in PRONOUNS.items() if one != kind)
        parts = {"person": choice(rng, professions[kind]), "verb": choice(rng, verbs)}
        clean, spans = fill(TEMPLATE, parts)
        return {
            "clean": clean,
            "corrupt": fill(TEMPLATE, parts | {"person": OTHERS[kind]})[0],
            "answer": f" {PRONOUNS[kind]}",
            "corrupt_answer": f" {other}",
            "marks": spans,
            "groups": {"stereotype": kind},
        }

    return draw_pairs(tokenizer, n_pairs, seed, draw)


TASK = Task(
    name="gender",
    about="a person said that she or he: what a model takes from the profession alone",
    function=gender,
    source="arXiv 2004.12265",
    example={
        "clean": "The singer wished that",
        "corrupt": "The man wished that",
        "answer": " she",
        "corrupt_answer": " he",
    },
)
