"""A tokenizer in which every word of the tasks is one token, with the space before it, and years are two."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module

from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from transformers import PreTrainedTokenizerFast

from mamba_ioi.tasks.ioi import OBJECTS, PLACES, TEMPLATES

BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"
_PIECES = r"After|wards|F(?=riends)|riends| ?[A-Za-z]+| ?\d\d|\n+ *|[^\w\s]"
_FILES = ("agreement", "capitals", "colors", "docstring", "gender", "greater_than")


@cache
def task_tokenizer(*, eos: str = EOS) -> PreTrainedTokenizerFast:
    """The tokenizer; ``eos`` may be `BOS`, as in GPT-NeoX's."""
    words = {
        "actors",
        "Aaron",
        "Bella",
        "Carl",
        "Diana",
        "Edgar",
        "Felix",
        "self",
        "After",
        "wards",
        "F",
        "riends",
        "\n    ",
        "\n\n    ",
    }
    words |= {word for text in (*TEMPLATES, *PLACES, *OBJECTS) for word in re.findall(r"\w+", text)}
    for name in _FILES:
        constants = vars(import_module(f"mamba_ioi.tasks.{name}"))
        words |= {piece for text in _texts([constants[key] for key in constants if key.isupper()]) for piece in text}
    words |= {f"{noun}s" for noun in import_module("mamba_ioi.tasks.agreement").NOUNS}
    words |= {f"{number:02d}" for number in range(100)} | set('.,:;?()"')
    pieces = sorted(words | {f" {word}" for word in words if word.isalnum()})
    vocabulary = {piece: number for number, piece in enumerate([UNKNOWN, BOS, EOS, *pieces])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(_PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=BOS, eos_token=eos)


def with_pieces() -> PreTrainedTokenizerFast:
    """One like Llama's: a piece begins with "▁" for the space before it, and every text with another."""
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(_few("▁"))}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = Split(Regex(r"▁?[A-Za-z]+|▁|[.?]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS)


def without_spaces() -> PreTrainedTokenizerFast:
    """One like BERT's: it knows neither spaces nor capitals."""
    pieces = dict.fromkeys(piece.lower() for piece in _few(""))
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS)


def _few(space: str) -> list[str]:
    """The words of two tasks, each with what stands for the space before it."""
    from mamba_ioi.tasks.agreement import NOUNS, PREPOSITIONS, VERBS
    from mamba_ioi.tasks.colors import COLORS, OBJECTS

    words = [*NOUNS, *(f"{noun}s" for noun in NOUNS), *PREPOSITIONS, *VERBS, *VERBS.values(), *COLORS, *OBJECTS]
    words += ["The", "the", "a", "is", "What", "color", "It"]
    return list(dict.fromkeys([UNKNOWN, BOS, EOS, space, ".", "?", *(f"{space}{word}" for word in words)]))


def _texts(value: object) -> Iterator[list[str]]:
    """The words of every text in a constant."""
    if isinstance(value, str):
        yield re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", value))
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
