"""Short labels of the positions of aligned prompts, for the axes of heat maps."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from ..tasks.pairs import PromptPairs

_PATTERN = re.compile(r"(\w{3}) (\w{2}) \w -> (\w{3}) (\w{2}) \w")


def token_labels(data: PromptPairs, tokenizer: PreTrainedTokenizerBase | None, label: object) -> list[str]:
    """One label a position for the rows of one label, such as a corruption.

    * At a corruption's five names: the slot and its letter in the corruption's pattern, ``n4 A``, or ``n1 C->D`` where
      the corruption replaces it (swapped rows replace it the other way round); the names themselves, ``Lauren`` or
      ``Lauren->Wesley``, where all rows have the same five.
    * Elsewhere: the token, without the spaces around it (``and``; ``is->was`` where clean and corrupt differ), where
      all rows have the same, the first being ``BOS``; else, and at padding, the position's label in
      ``data.position_labels``, such as ``pos11``, or ``pos11 A->B`` where clean and corrupt differ in all rows.

    Args:
        data: aligned rows, all of ``label``.
        tokenizer: turns token ids into text; None gives slots and position labels alone.
        label: of the rows' group; one of `CORRUPTIONS` says more of names.
    """
    assert data.position_labels is not None  # aligned rows have them
    letters = _slot_letters(str(label)) if {"n1", "n2", "n3", "n4", "n5"} <= set(data.position_labels) else {}
    shared = [_shared_token(data, tokenizer, position) for position in range(data.clean_tokens.shape[1])]
    same_names = all(shared[data.position_labels.index(name)] for name in letters)
    found = []
    changed = (data.clean_tokens != data.corrupt_tokens).all(0).nonzero()[:, 0].tolist()
    for position, (name, token) in enumerate(zip(data.position_labels, shared, strict=True)):
        if name in letters and not same_names:
            found.append(f"{name} {letters[name]}")
        elif token is None or name.startswith("pad"):
            found.append(f"{name} A->B" if position in changed and not letters else name)
        else:
            found.append(token)
    return found


def _shared_token(data: PromptPairs, tokenizer: PreTrainedTokenizerBase | None, position: int) -> str | None:
    """The token there, ``clean->corrupt`` if they differ; None if rows differ or there is no tokenizer."""
    clean, corrupt = data.clean_tokens[:, position], data.corrupt_tokens[:, position]
    if tokenizer is None or (clean != clean[0]).any() or (corrupt != corrupt[0]).any():
        return None
    if position == 0:
        return "BOS"
    one, other = (str(tokenizer.decode([int(tokens[0])])).strip() for tokens in (clean, corrupt))
    return one if one == other else f"{one}->{other}"


def _slot_letters(corruption: str) -> dict[str, str]:
    """``n1`` … ``n5`` -> the letter there, ``C->D`` where it changes; empty for a label of another form."""
    match = _PATTERN.fullmatch(corruption)
    if match is None:
        return {}
    first, second, third, fourth = match.groups()
    pairs = zip(first + second, third + fourth, strict=True)
    return {f"n{slot}": one if one == other else f"{one}->{other}" for slot, (one, other) in enumerate(pairs, start=1)}
