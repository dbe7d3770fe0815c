"""The small tokenizer of the embedded models: segments the IOI prompts as GPT-NeoX-20B's, in a few hundred tokens.

Byte-level BPE, so every text has a segmentation and decodes to itself. Words of the task and the names of the model
stand in the vocabulary whole: a pre-token found there is taken as it is (`ignore_merges`). The merge rules serve the
rest: first those that build "After|wards" and "F|riends", the two openings that GPT-NeoX splits, then a few learned
from the project's list of names, which split any other name into a handful of pieces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES

BOS = "<|endoftext|>"
"""Token 0: begins every prompt; also ends a text and pads a batch, as in GPT-NeoX's tokenizer."""

TINY_NAMES: tuple[str, ...] = tuple(
    [
        "Aaron",
        "Adam",
        "Albert",
        "Alfred",
        "Alice",
        "Allison",
        "Amy",
        "Andrea",
        "Andy",
        "Anthony",
        "Arnold",
        "Ashley",
        "Barry",
        "Ben",
        "Beth",
        "Bill",
        "Bob",
        "Brad",
        "Brian",
        "Calvin",
        "Carl",
        "Casey",
        "Catherine",
        "Charlie",
        "Chloe",
        "Claire",
        "Claude",
        "Cody",
        "Connie",
        "Crystal",
        "Dale",
        "Dan",
        "David",
        "Dean",
        "Dennis",
        "Diane",
        "Doug",
        "Duncan",
        "Eddie",
        "Edmund",
        "Edwin",
        "Eli",
        "Elliot",
        "Emily",
        "Erik",
        "Ethan",
        "Eva",
        "Felix",
        "Frances",
        "Frank",
        "Gary",
        "Gene",
        "Gerald",
        "Gloria",
        "Grace",
        "Greg",
        "Harold",
        "Harry",
        "Helen",
        "Herman",
        "Hope",
        "Hugo",
        "Ian",
        "Isaac",
        "Ivan",
        "Jacob",
        "James",
        "Jamie",
        "Jason",
        "Jeff",
        "Jenny",
        "Jerry",
        "Jessica",
        "Joan",
        "John",
        "Jordan",
        "Josh",
        "Judith",
        "Julie",
        "Justin",
        "Karen",
        "Kate",
        "Kathleen",
        "Katie",
        "Kenneth",
        "Kim",
        "Kurt",
        "Larry",
        "Laura",
        "Lauren",
        "Lee",
        "Leslie",
        "Lily",
        "Lisa",
        "Liz",
        "Logan",
        "Lucas",
        "Lucy",
        "Luke",
        "Madison",
        "Margaret",
        "Marie",
        "Mark",
        "Martha",
        "Martin",
        "Mary",
        "Matt",
        "Max",
        "Michael",
        "Michelle",
        "Miles",
        "Mitchell",
        "Morgan",
        "Murray",
        "Nathan",
        "Nicholas",
        "Nicole",
        "Norman",
        "Olivia",
        "Owen",
        "Patrick",
        "Paul",
        "Peggy",
        "Peter",
        "Phil",
        "Ralph",
        "Raymond",
        "Rex",
        "Riley",
        "Robert",
        "Robin",
        "Ron",
        "Rose",
        "Ruby",
        "Ryan",
        "Sam",
        "Sandra",
        "Sean",
        "Shane",
        "Sharon",
        "Shirley",
        "Simon",
        "Stan",
        "Steve",
        "Stuart",
        "Susan",
        "Sydney",
        "Teresa",
        "Theodore",
        "Tim",
        "Todd",
        "Tom",
        "Travis",
        "Tyler",
        "Vernon",
        "Violet",
        "Wallace",
        "Warren",
        "Wesley",
        "Will",
    ]
)
"""The 160 names of `tiny`: single tokens of GPT-NeoX with a leading space, none a strict prefix of another."""

_SPLIT_OPENINGS = {"Afterwards": ("After", "wards"), "Friends": ("F", "riends")}
_LEARNED_MERGES = 120

_byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _pretokens(text: str) -> list[str]:
    """The byte-level pre-tokens of a text: a leading space is written as "Ġ"."""
    return [token for token, _ in _byte_level.pre_tokenize_str(text)]


def _task_words() -> list[str]:
    """Every pre-token of the templates, places and objects that is one token, in a fixed order, without the names."""
    literal = [
        token for template in TEMPLATES for part in re.split(r" \[\w+\]", template) for token in _pretokens(part)
    ]
    filled = [token for word in PLACES + OBJECTS for token in _pretokens(f" {word}")]
    return [word for word in dict.fromkeys(literal + filled) if word not in _SPLIT_OPENINGS]


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with every occurrence of the pair joined, from left to right."""
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _merges() -> list[tuple[str, str]]:
    """The merge rules: those for the split openings, then the most frequent pairs in the list of candidate names."""
    merges: list[tuple[str, str]] = []
    for piece in (piece for pieces in _SPLIT_OPENINGS.values() for piece in pieces):
        merges += [(piece[:k], piece[k]) for k in range(1, len(piece))]
    whole_names = {token for name in NAMES for token in _pretokens(f" {name}")}
    words = [list(name) for name in sorted(whole_names)]
    for pair in merges:
        words = [_merged(word, pair) for word in words]
    for _ in range(_LEARNED_MERGES):
        counts = Counter(pair for word in words for pair in pairwise(word))
        # A merge must not make a name whole: which names are single tokens is the caller's choice.
        pair = min((p for p in counts if "".join(p) not in whole_names), key=lambda p: (-counts[p], p))
        merges.append(pair)
        words = [_merged(word, pair) for word in words]
    return merges


def build_tokenizer(names: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that segments the four IOI templates as GPT-NeoX-20B's, with the given names as single tokens.

    With the token 0, "<|endoftext|>", in front, a prompt of templates 1, 2 and 4 has 20 tokens and its names stand at
    3, 5, 7, 13 and 15; a prompt of template 3 has 19 (paper, section 3). No special token is added by itself. Any
    other text splits into pieces and bytes, and decodes to itself.

    Args:
        names: First names that are to be single tokens with a leading space; by default `TINY_NAMES`.

    Returns:
        The tokenizer, ready for `save_pretrained`; "<|endoftext|>" is its BOS, EOS and padding token.

    Raises:
        ValueError: A name is not one capitalised word, stands twice, or is a strict prefix of another.
    """
    names = TINY_NAMES if names is None else tuple(names)
    for name in names:
        if not re.fullmatch(r"[A-Z][a-z]+", name):
            raise ValueError(f"name {name!r} cannot be one token: a capital followed by small letters a-z is needed")
        if names.count(name) > 1:
            raise ValueError(f"name {name!r} stands more than once among the names; each must stand once")
        longer = next((other for other in names if other != name and other.startswith(name)), None)
        if longer:
            raise ValueError(f"name {name!r} is a strict prefix of {longer!r}; keep only one of the two")
    merges = _merges()
    tokens = [BOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *_task_words(), *(f"Ġ{name}" for name in names)]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: k for k, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
