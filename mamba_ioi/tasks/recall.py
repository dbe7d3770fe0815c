"""Associative recall: keys and values in pairs, then a key: its value."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..checks import integer, whole_number
from .pairs import PromptPairs
from .task import Task, draw_pairs
from .texts import Record
from .words import beginning, choice, one_of, require, sample, vocabulary

CHANGES = ("value", "key")
MOST = 256
"""How many keys, and how many values, unless they are given."""
_DIVIDERS = (".", ":", ";", "|", "\n")


def recall(
    tokenizer: PreTrainedTokenizerBase,
    n_pairs: int,
    seed: int,
    *,
    pairs: int = 8,
    queries: int = 1,
    keys: int | Sequence[str] | None = None,
    values: int | Sequence[str] | None = None,
    change: str = "value",
    divider: str | None = None,
) -> PromptPairs:
    """Pairs of prompts ``BOS k1 v1 … kn vn DIVIDER kq``, which vq continues (arXiv 2505.15105).

    Keys and values are drawn without replacement from two vocabularies that share no token; prompts are made of token
    ids. Several queries are chained in the prompt, each but the last with its value, ``… DIVIDER kq vq kr``, as in
    multi-query recall (arXiv 2312.04927): a row is read at its last query, and no key is asked for twice.

    The corrupt prompt differs in one token, of the pair that the last query asks for:

    * ``change="value"``: another value stands there, which no other place has. It is the corrupt answer.
    * ``change="key"``: another key stands there, so that nothing in the corrupt prompt answers the query. The corrupt
      answer is then one of the other values of the prompt, by chance: what to compare the right one with.

    Marks: ``key`` and ``value`` (where the pair that is asked for stands), ``divider``, and where there are several
    queries ``query1``, ``query2``, …, the earlier ones; the last query is ``last``. Group: ``asked``, which of the
    pairs is asked for last, from 1. Candidates: the values of both prompts. Metric: ``logit_diff``.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.
        pairs: how many keys with values a prompt has.
        queries: how many queries a prompt has.
        keys: how many words are keys, or the keys, texts of one token each (``" red"``); None for as many as there are,
            256 at most. The words (see `vocabulary`) are keys and values in turn, whatever the seed.
        values: the same of values.
        change: ``"value"`` or ``"key"``.
        divider: a text of one token. If None, the tokenizer's EOS, as in the paper; where EOS is BOS too (as in
            GPT-NeoX's tokenizer, where it says that a new text begins) or is not there, a full stop.

    Raises:
        ValueError: if an option is not as it should be, or the vocabulary has too few words.
    """
    pairs = whole_number(pairs, "pairs", least=1)
    queries = whole_number(queries, "queries", least=1, most=pairs)
    change = one_of(change, "change", CHANGES)
    if change == "key" and pairs == 1:
        raise ValueError("with change='key' a prompt needs 2 pairs at least: another value is the corrupt answer")
    known_keys, known_values = vocabularies(tokenizer, keys, values)
    require(known_keys, pairs + (change == "key"), "the keys")
    require(known_values, pairs + (change == "value"), "the values")
    front, between = beginning(tokenizer), divider_token(tokenizer, divider)

    def draw(rng: random.Random) -> Record:
        k, v = sample(rng, known_keys, pairs), sample(rng, known_values, pairs)
        *earlier, asked = sample(rng, range(pairs), queries)
        tail = [between, *(token for one in earlier for token in (k[one], v[one])), k[asked]]
        context = [token for pair in zip(k, v, strict=True) for token in pair]
        changed = list(context)
        if change == "value":
            other = _another(rng, known_values, v)
            changed[2 * asked + 1] = other
        else:
            other = choice(rng, [value for value in v if value != v[asked]])
            changed[2 * asked] = _another(rng, known_keys, k)
        clean, start = front + context + tail, len(front)
        marks = {"key": start + 2 * asked, "value": start + 2 * asked + 1, "divider": start + 2 * pairs}
        return {
            "clean_tokens": clean,
            "corrupt_tokens": front + changed + tail,
            "last_position": len(clean) - 1,
            "answer_tokens": v[asked],
            "corrupt_answer_tokens": other,
            "candidate_tokens": list(dict.fromkeys([*v, other])),
            "marks": marks | {f"query{i + 1}": marks["divider"] + 1 + 2 * i for i in range(queries - 1)},
            "groups": {"asked": asked + 1},
        }

    return draw_pairs(tokenizer, n_pairs, seed, draw)


def vocabularies(
    tokenizer: PreTrainedTokenizerBase,
    keys: int | Sequence[str] | None = None,
    values: int | Sequence[str] | None = None,
) -> tuple[list[int], list[int]]:
    """The tokens that are keys, and those that are values; arguments as of `recall`.

    Raises:
        ValueError: if a token is both, a text is not one token, or there are not as many words as asked for.
    """
    given = {name: _tokens(tokenizer, one, name) for name, one in (("keys", keys), ("values", values))}
    twice = set(given["keys"] or ()) & set(given["values"] or ())
    if twice:
        raise ValueError(f"{tokenizer.decode([min(twice)])!r} is among the keys and among the values; it can be one")
    taken = {token for tokens in given.values() for token in tokens or ()}
    numbers = [MOST if one is None else integer(one) or 0 for one in (keys, values)]
    words = vocabulary(tokenizer, 2 * max(numbers) + len(taken)).values()
    words = [token for token in words if token not in taken]
    found = []
    for (name, tokens), one, own in zip(given.items(), (keys, values), (words[::2], words[1::2]), strict=True):
        if tokens is None:
            n = min(MOST, len(own)) if one is None else whole_number(one, name, least=1)  # pyright: ignore[reportArgumentType]
            if n > len(own):
                raise ValueError(f"{name} are to be {n}, and the tokenizer has {len(own)} words for them")
            tokens = own[:n]
        found.append(tokens)
    return found[0], found[1]


def divider_token(tokenizer: PreTrainedTokenizerBase, divider: str | None = None) -> int:
    """The token between the pairs and the queries; see `recall`.

    Raises:
        ValueError: if the text is not one token; or there is none, and the tokenizer has no token that could be it.
    """
    if divider is not None:
        return _tokens(tokenizer, [divider], "divider")[0]  # pyright: ignore[reportOptionalSubscript]
    if tokenizer.eos_token_id not in (None, tokenizer.bos_token_id):
        return tokenizer.eos_token_id  # pyright: ignore[reportReturnType]
    for ids in tokenizer(list(_DIVIDERS), add_special_tokens=False)["input_ids"]:
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    raise ValueError("the tokenizer has no EOS besides BOS, and no full stop, to stand after the pairs; give a divider")


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: object, name: str) -> list[int] | None:
    """The tokens of texts; None for anything that is a number of them, or none."""
    if texts is None or integer(texts) is not None:
        return None
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"{name} are a whole number or a list of texts, not {texts!r:.80}")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name}: {text!r:.80} is no text of one token")
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"{name}: the tokenizer has no single token for {text!r}")
    return list(dict.fromkeys(ids[0] for ids in encoded))


def _another(rng: random.Random, known: Sequence[int], taken: Sequence[int]) -> int:
    """A token that is not taken; there is one."""
    while (token := choice(rng, known)) in taken:
        pass
    return token


TASK = Task(
    name="recall",
    about="keys and values stand in pairs, then comes one of the keys: its value follows",
    function=recall,
    source="arXiv 2505.15105; several queries: arXiv 2312.04927",
    example={
        "clean": " Lucy Ralph Mary Ashley Tyler Stuart Barry Jamie store went Raymond Sydney Edmund Kate Felix "
        "arrived. Edmund",
        "corrupt": " Lucy Ralph Mary Ashley Tyler Stuart Barry Jamie store went Raymond Sydney Edmund Owen Felix "
        "arrived. Edmund",
        "answer": " Kate",
        "corrupt_answer": " Owen",
    },
)
