"""The small tokenizer of models that recall: common words, each one token, which are keys and values in turn."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from ..checks import whole_number
from ..tasks.lexicon import COMMON

BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"


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
    vocabulary = {piece: number for number, piece in enumerate([BOS, EOS, UNKNOWN, *(f" {word}" for word in words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(f"{BOS}|{EOS}|{UNKNOWN}| ?[A-Za-z]+"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=BOS, unk_token=UNKNOWN, padding_side="right"
    )
