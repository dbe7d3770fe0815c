"""The small tokenizers of models that are trained on one task: each of its words, with the space before, is a token."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from ..checks import whole_number
from ..tasks.greater_than import CENTURIES, EVENTS, TEMPLATE
from ..tasks.lexicon import COMMON

BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"
_WORD = " ?[A-Za-z]+"


def build_tokenizer(n_keys: int = 32) -> PreTrainedTokenizerFast:
    """A tokenizer of BOS (which also pads), EOS, a token for unknown words, and common words with the space before.

    The recall task draws its keys and values from the words in turn: the first is a key, the second a value.

    Args:
        n_keys: how many keys there are to be, and as many values.

    Raises:
        ValueError: if there are not so many words.
    """
    n_keys = whole_number(n_keys, "n_keys", least=1, most=len(COMMON) // 2)
    words = COMMON[:: len(COMMON) // (2 * n_keys)][: 2 * n_keys]
    return _tokenizer((f" {word}" for word in words), _WORD)


def years_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words of the task greater_than, of centuries (a token with the space) and years (one without).

    BOS, EOS and the token for unknown words are as in `build_tokenizer`.
    """
    words = re.findall(r" ?[A-Za-z]+", re.sub(r"\{\w+\}", "", TEMPLATE))
    pieces = [*words, *(f" {word}" for word in EVENTS), *(f" {century}" for century in CENTURIES)]
    return _tokenizer([*pieces, *(f"{year:02d}" for year in range(100))], f"{_WORD}| ?[0-9]{{2}}")


def _tokenizer(pieces: Iterable[str], known: str) -> PreTrainedTokenizerFast:
    """A tokenizer that has a token for each piece, and splits texts by a pattern."""
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([BOS, EOS, UNKNOWN, *pieces]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(f"{BOS}|{EOS}|{UNKNOWN}|{known}"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=BOS, unk_token=UNKNOWN, padding_side="right"
    )
