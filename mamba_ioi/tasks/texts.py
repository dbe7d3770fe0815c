"""Rows of texts, or of token ids, as columns of token ids: each row a record with the fields of a file.

A record of texts has ``clean``, ``corrupt``, ``answer``, ``corrupt_answer`` and optional ``candidates``, ``marks``,
``bos`` and ``length`` (to pad to); one of token ids ``clean_tokens``, ``corrupt_tokens``, ``last_position``,
``answer_tokens``, ``corrupt_answer_tokens``, ``candidate_tokens`` and ``marks`` (positions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
TEXT_FIELDS = ("clean", "corrupt", "answer", "corrupt_answer")
TOKEN_FIELDS = (
    "clean_tokens",
    "corrupt_tokens",
    "last_position",
    "answer_tokens",
    "corrupt_answer_tokens",
    "candidate_tokens",
)


def text_records(
    columns: Mapping[str, Sequence], marks: Mapping[str, Sequence] | None, candidates: Sequence | None, *, bos: bool
) -> list[Record]:
    """The records of texts that come as columns.

    Args:
        columns: prompts and answers, ``clean``, ``corrupt``, ``answers``, ``corrupt_answers``, an entry a row.
        marks: names of positions, an entry a row each.
        candidates: lists of texts, one a row.
        bos: whether BOS is put in front.

    Raises:
        ValueError: if a column is no list, or shorter or longer than the others.
    """
    if marks is not None and not isinstance(marks, Mapping):
        raise ValueError(f"marks are names with an entry a row each, not {marks!r:.80}")
    if not isinstance(bos, bool):
        raise ValueError(f"bos is True or False, not {bos!r}")
    listed = {name: _column(value, name) for name, value in columns.items()}
    named = {name: _column(value, f"mark {name!r}") for name, value in (marks or {}).items()}
    compete = {} if candidates is None else {"candidates": _column(candidates, "candidates")}
    rows = len(listed["clean"])
    for name, column in (*listed.items(), *compete.items(), *((f"mark {name!r}", named[name]) for name in named)):
        if len(column) != rows:
            raise ValueError(f"{name} has {len(column)} rows, clean has {rows}: row {min(len(column), rows)} lacks one")
    records = []
    for row in range(rows):
        record: Record = {name: column[row] for name, column in zip(TEXT_FIELDS, listed.values(), strict=True)}
        record |= {name: column[row] for name, column in compete.items()}
        if named:
            record["marks"] = {name: column[row] for name, column in named.items()}
        records.append(record if bos else record | {"bos": False})
    return records


def _column(value: Any, name: str) -> list:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name} must be a list with an entry a row, not {value!r:.80}")
    return [entry.tolist() if hasattr(entry, "tolist") else entry for entry in value]


def token_columns(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> Record:
    """The fields of a `PromptPairs` that the records hold, groups and metric apart.

    Args:
        tokenizer: a transformers tokenizer.
        records: the rows.

    Raises:
        ValueError: if a record is not as it should be: a sentence with row, field and value.
    """
    if not records:
        raise ValueError("there are no rows; one is needed at least")
    reader = _Reader(tokenizer)
    rows = [_encoded(reader, record, row) for row, record in enumerate(records)]
    pad, length = padding_token(tokenizer), 0
    for row, record in enumerate(records):
        if not _whole(record.get("length", 0)):
            raise ValueError(f"row {row} of length: {record['length']!r:.80} is no whole number")
        length = max(length, record.get("length", 0))
    columns: Record = {
        "clean_tokens": _padded([row.clean for row in rows], pad, length),
        "corrupt_tokens": _padded([row.corrupt for row in rows], pad, length),
        "last_position": torch.tensor([row.last for row in rows]),
        "marks": {
            name: torch.tensor([row.marks.get(name, -1) for row in rows])
            for name in dict.fromkeys(name for row in rows for name in row.marks)
        },
    }
    for name in ("answers", "corrupt_answers"):
        column = [getattr(row, name) for row in rows]
        sets = any(isinstance(entry, list) for entry in column)
        listed = [entry if isinstance(entry, list) else [entry] for entry in column]
        columns[name] = _padded(listed, -1) if sets else torch.tensor(column)
    if any(row.candidates is not None for row in rows):
        columns["candidates"] = _padded([row.competing() for row in rows], -1)
    return columns


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that pads: the tokenizer's own, else its end or its beginning, else 0."""
    own = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return next(token for token in own if isinstance(token, int))


def _padded(rows: list[list[int]], pad: int, least: int = 0) -> Int[Tensor, "B n"]:
    width = max(least, *map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.long)


@dataclass(frozen=True)
class _Row:
    """A record in token ids; answers are lists where they are sets."""

    clean: list[int]
    corrupt: list[int]
    last: int
    answers: int | list[int]
    corrupt_answers: int | list[int]
    candidates: list[int] | None
    marks: dict[str, int]

    def competing(self) -> list[int]:
        """The candidates, or else the answers."""
        if self.candidates is not None:
            return self.candidates
        sets = [ids if isinstance(ids, list) else [ids] for ids in (self.answers, self.corrupt_answers)]
        return list(dict.fromkeys(token for ids in sets for token in ids if token >= 0))


class _Reader:
    """A tokenizer that reads each text once: answers and candidates come again in many rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self._spans: dict[str, list[tuple[int, int]]] = {}

    def ids(self, text: str) -> list[int]:
        """The text's tokens, without special ones in front."""
        if text not in self._ids:
            self._ids[text] = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self._ids[text])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters [start, end) of each of the text's tokens."""
        if text not in self._spans:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            self._spans[text] = encoded["offset_mapping"]  # pyright: ignore[reportArgumentType]
        return self._spans[text]


def _encoded(reader: _Reader, record: Record, row: int) -> _Row:
    tokens, texts = ([name for name in names if name in record] for names in (TOKEN_FIELDS, TEXT_FIELDS))
    if tokens and texts:
        raise ValueError(f"row {row}: it has texts ({texts[0]}) and token ids ({tokens[0]}); keep one of the two")
    wanted = TOKEN_FIELDS[:5] if tokens else TEXT_FIELDS
    for name in wanted:
        if name not in record:
            raise ValueError(f"row {row} lacks the field {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
    marks = record.get("marks", {})
    if not isinstance(marks, Mapping):
        raise ValueError(f"row {row} of marks: {marks!r:.80} is no object such as {{'name': 'a text in the prompt'}}")
    return _from_tokens(record, row, marks) if tokens else _from_texts(reader, record, row, marks)


def _from_tokens(record: Record, row: int, marks: Mapping[str, Any]) -> _Row:
    found: Record = {}
    for name in TOKEN_FIELDS:
        value = record.get(name)
        several = name in ("clean_tokens", "corrupt_tokens", "candidate_tokens")
        allowed = isinstance(value, list) if several else isinstance(value, list) or _whole(value)
        entries = value if isinstance(value, list) else [value]
        if name == "candidate_tokens" and value is None:
            allowed, entries = True, []
        if not allowed or not all(map(_whole, entries)) or (name == "last_position" and isinstance(value, list)):
            raise ValueError(f"row {row} of {name}: {value!r:.80} is not made of token ids")
        found[name] = value
    for name, position in marks.items():
        if position is not None and not _whole(position):
            raise ValueError(f"row {row} of mark {name!r}: {position!r} is no position, as rows of token ids need it")
    clean, corrupt = found["clean_tokens"], found["corrupt_tokens"]
    if len(clean) != len(corrupt):
        raise ValueError(f"row {row}: clean_tokens has {len(clean)} tokens, corrupt_tokens {len(corrupt)}")
    return _Row(
        clean,
        corrupt,
        found["last_position"],
        found["answer_tokens"],
        found["corrupt_answer_tokens"],
        found["candidate_tokens"],
        {name: -1 if position is None else position for name, position in marks.items()},
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _from_texts(reader: _Reader, record: Record, row: int, marks: Mapping[str, Any]) -> _Row:
    for name in ("clean", "corrupt"):
        if not isinstance(record[name], str) or not record[name]:
            raise ValueError(f"row {row} of {name}: {record[name]!r:.80} is no text")
    bos = record.get("bos", True)
    if not isinstance(bos, bool):
        raise ValueError(f"row {row} of bos: it is true or false, not {bos!r}")
    bare = [reader.ids(record[name]) for name in ("clean", "corrupt")]
    clean, corrupt = (_with_bos(reader.tokenizer, ids) if bos else ids for ids in bare)
    if len(clean) != len(corrupt):
        raise ValueError(
            f"row {row}: the clean and the corrupt prompt differ in length; clean is {len(clean)} tokens long, "
            f"corrupt {len(corrupt)}: {record['clean']!r:.80}, {record['corrupt']!r:.80}"
        )
    if not clean:
        raise ValueError(f"row {row} of clean: {record['clean']!r:.80} has no tokens")
    answers, wrong = (
        _answer_ids(reader, record[name], name, row, record[prompt], ids)
        for name, prompt, ids in zip(TEXT_FIELDS[2:], TEXT_FIELDS, bare, strict=False)
    )
    candidates = record.get("candidates")
    if candidates is not None:
        if isinstance(candidates, str) or not isinstance(candidates, Sequence):
            raise ValueError(f"row {row} of candidates: {candidates!r:.80} is no list of texts")
        candidates = _answer_ids(reader, list(candidates), "candidates", row, record["clean"], bare[0])
    front = len(clean) - len(bare[0])
    positions = {
        name: _position(reader, record["clean"], part, f"row {row} of mark {name!r}", front)
        for name, part in marks.items()
    }
    return _Row(clean, corrupt, len(clean) - 1, answers, wrong, candidates, positions)  # pyright: ignore[reportArgumentType]


def _with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The tokens with BOS in front, unless they begin with it or the tokenizer has none."""
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]  # pyright: ignore[reportReturnType]


def _answer_ids(reader: _Reader, value: Any, name: str, row: int, prompt: str, ids: list[int]) -> int | list[int]:
    """The token of an answer, or those of a list of answers."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"row {row} of {name}: the list [] is empty; give one text at least")
        return [_answer_id(reader, text, name, row, prompt, ids) for text in value]
    return _answer_id(reader, value, name, row, prompt, ids)


def _answer_id(reader: _Reader, text: Any, name: str, row: int, prompt: str, ids: list[int]) -> int:
    """The one token that the text is, where it continues the prompt (``ids`` without BOS)."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"row {row} of {name}: {text!r:.80} is no text of one token")
    alone = reader.ids(text)
    if not (text[0].isspace() and len(alone) == 1):
        together = reader.ids(prompt + text)
        if together[:-1] == ids:
            alone = together[-1:]
        elif prompt[-1].isalpha() and text[0].isalpha():
            raise ValueError(
                f"row {row} of {name}: {text!r} does not continue the prompt {prompt[-30:]!r} as one token; an answer "
                f"is written with the space before it"
            )
    if len(alone) != 1:
        raise ValueError(f"row {row} of {name}: {text!r} is {len(alone)} tokens; an answer is one")
    if alone[0] == reader.tokenizer.unk_token_id and text.strip() != reader.tokenizer.unk_token:
        raise ValueError(f"row {row} of {name}: the tokenizer does not know {text!r}")
    return alone[0]


def _position(reader: _Reader, text: str, part: Any, name: str, front: int) -> int:
    """The position of the first token that overlaps a part of the text; ``front`` tokens stand before the text's."""
    if part is None:
        return -1
    if isinstance(part, str):
        start = text.find(part) if part else -1
        if start < 0:
            raise ValueError(f"{name}: {part!r} does not occur in {text!r:.200}")
        if text.find(part, start + 1) >= 0:
            raise ValueError(f"{name}: {part!r} occurs more than once in {text!r:.200}; give its [start, end)")
        end = start + len(part)
    else:
        valid = isinstance(part, list | tuple) and len(part) == 2 and all(map(_whole, part))
        start, end = part if valid else (0, 0)
        if not 0 <= start < end <= len(text):
            raise ValueError(f"{name}: {part!r} is neither a text nor characters [start, end) of {text!r:.200}")
    if not reader.tokenizer.is_fast:
        raise ValueError(f"{name}: marks in texts need a fast tokenizer, not {type(reader.tokenizer).__name__}")
    begun = 0
    for position, (first, stop) in enumerate(reader.spans(text)):
        if text[begun:first].isspace():
            first = begun  # a tokenizer may leave the space before a word out of the word's span
        if first < end and stop > start:
            return position + front
        begun = max(begun, stop)
    raise ValueError(f"{name}: no token overlaps {text[start:end]!r}")
