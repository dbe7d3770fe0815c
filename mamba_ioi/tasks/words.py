"""What tasks are drawn from: the words that a tokenizer has, random choices, and templates with marks.

Nothing here depends on anything but its arguments: the same tokenizer and seed give the same prompts on every machine.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from .lexicon import COMMON

T = TypeVar("T")
_BEFORE_WORDS = "Ġ▁ "  # how vocabularies write the space before a word
_WORD = re.compile(r"[A-Za-z][a-z]{3,}")


def listed(text: str) -> tuple[str, ...]:
    """The words of a text, which spaces separate."""
    return tuple(text.split())


def choice(rng: random.Random, options: Sequence[T]) -> T:
    """One option, uniformly. Only `Random.random` is promised to be the same in every version of Python."""
    return options[int(rng.random() * len(options))]


def sample(rng: random.Random, options: Sequence[T], n: int) -> list[T]:
    """``n`` options, uniformly and without replacement, in random order.

    Raises:
        ValueError: if there are fewer.
    """
    if n > len(options):
        raise ValueError(f"{n} of {len(options)} cannot be drawn without replacement")
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(n)]


def single_tokens(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> dict[str, int]:
    """The words that are one token where a space stands before them, each with its token, in the order given.

    The unknown token is none, and of two words with one token (tokenizers that know no capitals) the first is kept.
    """
    words = list(dict.fromkeys(words))
    if not words:
        return {}
    alone = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    others = [word for word, ids in zip(words, alone, strict=True) if len(ids) != 1]
    (front,) = tokenizer(["a"], add_special_tokens=False)["input_ids"]
    behind = tokenizer([f"a {word}" for word in others], add_special_tokens=False)["input_ids"] if others else []
    inside = {word: ids[len(front) :] for word, ids in zip(others, behind, strict=True) if ids[: len(front)] == front}
    found: dict[int, str] = {}
    for word, ids in zip(words, alone, strict=True):
        ids = inside.get(word, ids)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found.setdefault(ids[0], word)
    return {word: token for token, word in found.items()}


def vocabulary(tokenizer: PreTrainedTokenizerBase, least: int) -> dict[str, int]:
    """Words that are one token after a space, each with its token: those of `COMMON`, and others if they are too few.

    The others are the vocabulary's own, in its order: of four letters or more, the first alone a capital at most. Large
    vocabularies hold pieces of words among them. Words that differ in capitals alone count once.

    Args:
        tokenizer: a transformers tokenizer.
        least: how many are needed; where the common words are as many, there are no others.
    """
    common = single_tokens(tokenizer, COMMON)
    if len(common) >= least:
        return common
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    spaced = [token for token, _ in tokens if token[:1] in _BEFORE_WORDS and token[1:].isalpha()]
    words = {word: word for word in common}
    for token in spaced or [token for token, _ in tokens]:
        word = token.lstrip(_BEFORE_WORDS)
        if _WORD.fullmatch(word):
            words.setdefault(word.lower(), word)
    return single_tokens(tokenizer, words.values())


def require(found: Collection[object], least: int, what: str, wanted: Iterable[str] = ()) -> None:
    """Refuse a tokenizer that has fewer words of a kind as single tokens than a task needs.

    Args:
        found: those that it has.
        least: how many are needed.
        what: what they are, such as "the colors".
        wanted: the words that were looked for; some that are lacking are named.

    Raises:
        ValueError: if it has fewer.
    """
    if len(found) < least:
        lacking = [word for word in wanted if word not in found][:3]
        such = f" (it lacks {', '.join(map(repr, lacking))})" if lacking else ""
        raise ValueError(
            f"of {what} the tokenizer has {len(found)} as single tokens after a space{such}; {least} are needed"
        )


def one_of(value: object, name: str, allowed: Sequence[str]) -> str:
    """The value of an option that is one of a few words.

    Raises:
        ValueError: if it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r:.80}")
    return value


def fill(template: str, parts: Mapping[str, str]) -> tuple[str, dict[str, list[int]]]:
    """A template's text, and the characters [start, end) of each of its parts, which are marks of a row.

    Args:
        template: a text with ``{name}`` where a part goes, each at one place.
        parts: the parts by name.
    """
    text, spans = "", {}
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is not None:
            spans[name] = [len(text), len(text) + len(parts[name])]
            text += parts[name]
    return text, spans


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands in front of every prompt: the tokenizer's BOS token, or nothing where it has none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]  # pyright: ignore[reportReturnType]
