"""Pairs of a clean and a corrupt prompt of any task: what they are, and that they fit together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..metrics import measure
from .columns import check_distinct, check_ids, check_rows, integers, labels, refuse
from .files import group_columns, group_fields, metric_of, read_records, write_records
from .padding import check_ends, check_padding
from .texts import TEXT_FIELDS, TOKEN_FIELDS, Record, text_records, token_columns

METRICS = ("nld", "logit_diff", "prob_diff", "margin")
KEPT_FIELDS = (*TEXT_FIELDS, "candidates", "marks", "bos")
_OFFSET = re.compile(r"(?P<mark>.+)(?P<offset>[+-]\d+)$", re.DOTALL)


class Marks(dict[str, Tensor]):
    """Positions by name, [B] each, as a `PromptPairs` has checked them."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mapping)
            and self.keys() == other.keys()
            and all(torch.equal(positions, other[name]) for name, positions in self.items())
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Groups(dict[str, list]):
    """Labels by name, one a row, as a `PromptPairs` has checked them."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PromptPairs:
    """Pairs of a clean and a corrupt prompt, one pair a row.

    Everything is checked when a dataset is made, and again by `dataclasses.replace`. Tensors, numpy arrays and lists of
    whole numbers are taken. `pairs[i]` (one row), slices, lists, and boolean or integer tensors give those rows.

    Attributes:
        clean_tokens: [B, L] token ids of the clean prompts, padded on the right.
        corrupt_tokens: [B, L] token ids of the corrupt prompts, each as long as its clean one.
        answers: [B] token id that continues the clean prompt; or [B, A] sets of them, padded with -1.
        corrupt_answers: [B] or [B, A] the same of the corrupt prompt.
        last_position: [B] position of the last token, where logits are read; the last column if None is given.
        candidates: [B, C] token ids that compete, padded with -1; the answers and corrupt answers if None is given.
        marks: Names of positions: [B] each, -1 where a row has none. ``last`` is there of itself.
        groups: Names of groupings: one label a row each. Tables have a row for each value of the first.
        metric: What is measured: ``nld``, ``logit_diff``, ``prob_diff``, ``margin``, or a callable
            ``(logits [B, V], pairs) -> [B]``.

    Raises:
        ValueError: If something does not fit: a sentence with row, field and value.
    """

    clean_tokens: Int[Tensor, "B L"]
    corrupt_tokens: Int[Tensor, "B L"]
    answers: Int[Tensor, "B"] | Int[Tensor, "B A"]
    corrupt_answers: Int[Tensor, "B"] | Int[Tensor, "B A2"]
    last_position: Int[Tensor, "B"] | Any = None  # a tensor, once it is made
    candidates: Int[Tensor, "B C"] | Any = None
    marks: Mapping[str, Int[Tensor, "B"]] = field(default_factory=dict)
    groups: Mapping[str, list] = field(default_factory=dict)
    metric: str | Callable[..., Float[Tensor, "B"]] = "nld"
    _records: list[Record] | None = field(init=False, default=None)  # the rows of a file, where texts are known

    def __post_init__(self) -> None:
        given = self.last_position is not None
        self._check_prompts()
        self._check_answers()
        self._set("marks", Marks(self._checked_marks()))
        self._set("groups", Groups(self._checked_groups()))
        check_padding(self.clean_tokens, self.corrupt_tokens, self.last_position, given=given)

    # -----------------------------------------------------------------------------------------------------------------
    # Checks
    # -----------------------------------------------------------------------------------------------------------------

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _column(self, name: str, dims: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """A field of whole numbers, as a tensor with the data's rows."""
        column = integers(getattr(self, name), name, dims=dims, device=device)
        if name != "clean_tokens":
            check_rows(len(column), len(self.clean_tokens), name, "clean_tokens")
        self._set(name, column)
        return column

    def _check_prompts(self) -> None:
        clean = self._column("clean_tokens", (2,))
        corrupt = integers(self.corrupt_tokens, "corrupt_tokens", dims=(2,), device=clean.device)
        if clean.shape != corrupt.shape:
            raise ValueError(
                f"clean and corrupt prompts must have one length, row by row, and one padding: clean_tokens is "
                f"{tuple(clean.shape)}, corrupt_tokens {tuple(corrupt.shape)}"
            )
        self._set("corrupt_tokens", corrupt)
        rows, length = clean.shape
        if rows and not length:
            raise ValueError("row 0 of clean_tokens: the prompt is empty; it needs one token at least")
        check_ids(clean, "clean_tokens")
        check_ids(corrupt, "corrupt_tokens")
        if self.last_position is None:
            self._set("last_position", clean.new_full((rows,), length - 1))
        last = self._column("last_position", (1,), clean.device)
        refuse((last < 0) | (last >= length), last, "last_position", f"is no position of a prompt, 0 to {length - 1}")

    def _check_answers(self) -> None:
        device = self.clean_tokens.device
        for name in ("answers", "corrupt_answers"):
            ids = self._column(name, (1, 2), device)
            check_ids(ids, name, padded=ids.dim() == 2)
            if ids.dim() == 2:
                check_distinct(ids, name)
                empty = (ids < 0).all(1)
                if empty.any():
                    raise ValueError(f"row {int(empty.nonzero()[0])} of {name}: the set {[]} is empty; give one token")
        right, wrong = self.answer_sets
        if self.candidates is None:
            self._set("candidates", _union(right, wrong))
        candidates = self._column("candidates", (2,), device)
        check_ids(candidates, "candidates", padded=True)
        check_distinct(candidates, "candidates")
        for name, ids in (("answers", right), ("corrupt_answers", wrong)):
            missing = (ids >= 0) & (ids[:, :, None] != candidates[:, None, :]).all(2)
            refuse(missing, ids, name, "is not among the row's candidates")
        self._check_task(right, wrong, candidates)

    def _check_task(self, right: Int[Tensor, "B A"], wrong: Int[Tensor, "B A2"], candidates: Tensor) -> None:
        """The metric, and that each row's answers can tell a right run from a wrong one."""
        if not callable(self.metric) and not (isinstance(self.metric, str) and self.metric in METRICS):
            raise ValueError(f"metric is one of {', '.join(METRICS)}, or a callable, not {self.metric!r}")
        if isinstance(self.metric, str) and self.metric != "margin":
            for row in ((right.unsqueeze(2) == wrong.unsqueeze(1)) | (right < 0).unsqueeze(2)).any(2).all(1).nonzero():
                one, other = (_listed(ids[int(row)]) for ids in (right, wrong))
                if sorted(one) == sorted(other):
                    raise ValueError(
                        f"row {int(row)} of corrupt_answers: {other} are the clean prompt's answers too, which leaves "
                        f"the metric {self.metric!r} nothing to tell apart; with other answers, or metric='margin'"
                    )
        among = (candidates[:, :, None] == right[:, None, :]).any(2) | (candidates < 0)
        if among.all(1).any():
            row = int(among.all(1).nonzero()[0])
            raise ValueError(
                f"row {row} of candidates: all of {_listed(candidates[row])} are right answers; "
                f"one that is wrong is needed at least"
            )

    def _checked_marks(self) -> dict[str, Tensor]:
        if not isinstance(self.marks, Mapping):
            raise ValueError(f"marks are names of positions, {{name: [B]}}, not {self.marks!r:.80}")
        found = {}
        for name, value in self.marks.items():
            if not isinstance(name, str) or not name or name == "last" or _OFFSET.match(name):
                raise ValueError(
                    f"{name!r} is no name for a mark: names are texts that do not end as 'n1+1' does, and 'last' is "
                    f"there of itself"
                )
            field_name = f"mark {name!r}"
            positions = integers(value, field_name, dims=(1,), device=self.clean_tokens.device)
            check_rows(len(positions), len(self), field_name, "clean_tokens")
            refuse(positions < -1, positions, field_name, "is no position; -1 says that the row has none")
            ends = self.last_position
            refuse(positions > ends, positions, field_name, "is after the row's last_position, where the prompt ends")
            found[name] = positions
        return found

    def _checked_groups(self) -> dict[str, list]:
        if not isinstance(self.groups, Mapping) or not all(isinstance(name, str) and name for name in self.groups):
            raise ValueError(f"groups are names with one label a row, {{name: labels}}, not {self.groups!r:.80}")
        return {name: labels(value, f"group {name!r}", len(self)) for name, value in self.groups.items()}

    def check_model(self, vocab_size: int, pad: int | None = None) -> None:
        """Refuse token ids that a model does not have, and prompts that end in the token its tokenizer pads with.

        Args:
            vocab_size: how many tokens the model has.
            pad: the tokenizer's padding token; None if there is none.

        Raises:
            ValueError: if there is one.
        """
        for name in ("clean_tokens", "corrupt_tokens", "answers", "corrupt_answers", "candidates"):
            check_ids(getattr(self, name), name, padded=True, size=vocab_size)
        if pad is not None:
            ends = self.clean_tokens, self.corrupt_tokens, self.last_position
            check_ends(*ends, pad, "which the model's tokenizer pads with")

    # -----------------------------------------------------------------------------------------------------------------
    # Rows
    # -----------------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.clean_tokens)

    def __repr__(self) -> str:
        marks = "".join(f", {name}" for name in self.marks)
        return f"{type(self).__name__}({len(self)} rows of {self.clean_tokens.shape[1]} tokens, marks last{marks})"

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor):
        """The rows at `index`, as a dataset. Raises IndexError where there is no such row."""
        if isinstance(index, slice):
            rows = torch.tensor(range(len(self))[index], dtype=torch.long)
        elif isinstance(index, list | tuple) and len(index) == 0:
            rows = torch.zeros(0, dtype=torch.long)
        else:
            rows = torch.arange(len(self))[torch.as_tensor(index).cpu()].reshape(-1)
        part = object.__new__(type(self))  # these rows have been checked, beside all others
        for name in (one.name for one in fields(self)):
            part._set(name, _rows_of(getattr(self, name), rows))
        return part

    def select(self, **chosen: Any):
        """The rows whose labels are those chosen: ``select(group=label)``, or a list of labels.

        Raises:
            ValueError: for a group or a label that the data do not have.
        """
        rows = range(len(self))
        for name, wanted in chosen.items():
            if name not in self.groups:
                raise ValueError(f"the data have no group {name!r}; they have {_names(self.groups)}")
            known = list(dict.fromkeys(self.groups[name]))
            listed = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
            for label in listed:
                if label not in known:
                    raise ValueError(f"unknown {name} {label!r}; the data have {', '.join(map(repr, known))}")
            rows = [row for row in rows if self.groups[name][row] in listed]
        return self[list(rows)]

    def labels_of(self, group: str) -> list:
        """The labels of a group that occur in the data, in the order in which they first do."""
        return list(dict.fromkeys(self.groups[group]))

    @property
    def answer_sets(self) -> tuple[Int[Tensor, "B A"], Int[Tensor, "B A2"]]:
        """The answers and the corrupt answers as sets, padded with -1, also where each is one token."""
        right, wrong = (ids if ids.dim() == 2 else ids[:, None] for ids in (self.answers, self.corrupt_answers))
        return right, wrong

    @property
    def has_sets(self) -> bool:
        """Whether answers are sets of tokens, [B, A]."""
        return self.answers.dim() == 2 or self.corrupt_answers.dim() == 2

    def positions_of(self, mark: str) -> Int[Tensor, "B"]:
        """Each row's position of a mark, ``last``, or so many tokens after or before one (``n1+1``); -1 for none.

        Raises:
            ValueError: for an unknown mark, or where the position lies outside a row's prompt.
        """
        name, offset = mark, 0
        if isinstance(mark, str) and (match := _OFFSET.match(mark)):
            name, offset = match["mark"], int(match["offset"])
        if name != "last" and name not in self.marks:
            raise ValueError(f"the data have no mark {mark!r}; they have {_names(['last', *self.marks])}")
        start = self.last_position if name == "last" else self.marks[name]
        positions = torch.where(start < 0, start, start + offset)
        outside = (start >= 0) & ((positions < 0) | (positions > self.last_position))
        refuse(outside, positions, f"mark {mark!r}", "is no position of the row's prompt")
        return positions

    @property
    def position_labels(self) -> list[str] | None:
        """One label a position: the marks' names, `out` the last token, `padN` padding, `posN` any other.

        None unless all rows have their marks and their last token at the same positions.
        """
        layouts = torch.stack([*self.marks.values(), self.last_position], dim=1).unique(dim=0).tolist()
        if len(layouts) != 1:
            return None
        *positions, last = layouts[0]
        found = [f"pos{i}" if i <= last else f"pad{i}" for i in range(self.clean_tokens.shape[1])]
        for name, position in zip(self.marks, positions, strict=True):
            if position >= 0:
                found[position] = name
        found[last] = "out"
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # Texts and files
    # -----------------------------------------------------------------------------------------------------------------

    @staticmethod
    def from_texts(
        tokenizer: PreTrainedTokenizerBase,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answers: Sequence[str] | Sequence[Sequence[str]],
        corrupt_answers: Sequence[str] | Sequence[Sequence[str]],
        *,
        marks: Mapping[str, Sequence] | None = None,
        groups: Mapping[str, Sequence] | None = None,
        candidates: Sequence[Sequence[str]] | None = None,
        bos: bool = True,
    ) -> PromptPairs:
        """Pairs from texts.

        Args:
            tokenizer: a transformers tokenizer.
            clean: the clean prompts.
            corrupt: the corrupt prompts, each of as many tokens as its clean one.
            answers: what continues each clean prompt, as it does so (leading space and all), one token; or lists of
                such texts, of which each is right.
            corrupt_answers: the same of the corrupt prompts.
            marks: names of positions, an entry a row each: a text that occurs once in the clean prompt, the characters
                [start, end) of it, or None. The mark is the first token that overlaps it.
            groups: names of groupings, a label a row each.
            candidates: the tokens that compete, a list of texts a row; the answers if None.
            bos: put the tokenizer's BOS token in front, where it has one and the text does not begin with it.

        Raises:
            ValueError: if a prompt or an answer is not what it should be: a sentence with row, field and value.
        """
        columns = {"clean": clean, "corrupt": corrupt, "answers": answers, "corrupt_answers": corrupt_answers}
        records = text_records(columns, marks, candidates, bos=bos)
        return _with_records(records, groups=groups or {}, **token_columns(tokenizer, records))

    @staticmethod
    def from_records(tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, Any]]) -> PromptPairs:
        """Pairs from rows as a file has them, each a dict with the fields that `load` names.

        Args:
            tokenizer: a transformers tokenizer.
            records: a row a pair.

        Raises:
            ValueError: if a row is not as it should be: a sentence with row, field and value.
        """
        for row, record in enumerate(records):
            if not isinstance(record, Mapping):
                raise ValueError(f"row {row}: {record!r:.80} is no dict with the fields of a row")
        rows = [dict(record) for record in records]
        columns = token_columns(tokenizer, rows)
        return _with_records(rows, groups=group_columns(rows), metric=metric_of(rows), **columns)

    @staticmethod
    def load(path: str | Path, tokenizer: PreTrainedTokenizerBase, *, bos: bool = True) -> PromptPairs:
        """Pairs from a file with a row a pair: ``.jsonl``, ``.csv`` or ``.parquet``.

        Its fields: ``clean``, ``corrupt``, ``answer``, ``corrupt_answer`` (a text, or a list of them; in CSV a JSON
        list); optional ``candidates`` (a list), ``marks`` (an object: ``{"name": "a text in the prompt"}`` or
        ``[start, end]``), ``group`` (a label) or ``groups`` (an object), ``bos`` (false: none in front) and ``metric``.
        In CSV lists and objects are JSON. What `save` wrote of tokens is read too. See `from_texts` for their meaning.

        Raises:
            ValueError: if the file or a row of it is not as it should be: a sentence with file, row and value.
            OSError: if the file cannot be read.
        """
        try:
            records = read_records(path)
            if not bos:
                records = [record if "clean_tokens" in record else {"bos": False} | record for record in records]
            return PromptPairs.from_records(tokenizer, records)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None

    def save(self, path: str | Path) -> Path:
        """Write a file that `load` reads: ``.jsonl``, ``.csv`` or ``.parquet``; the path.

        Rows that came from texts are written as texts, others as token ids (``clean_tokens`` and so on).

        Raises:
            ValueError: if the file's name ends otherwise, or the metric is a callable, which no file can hold.
            OSError: if the file cannot be written.
        """
        if callable(self.metric):
            raise ValueError(
                f"the metric {self.metric!r} is a callable, which no file can hold: save replace(pairs, metric='nld')"
            )
        told = {} if self.metric == "nld" else {"metric": self.metric}
        rows = [self._record(row) | group_fields(self.groups, row) | told for row in range(len(self))]
        return write_records(path, rows)

    def _record(self, row: int) -> Record:
        """A row as a file has it: its texts where they are known, else its tokens."""
        if self._records is not None:
            length = self.clean_tokens.shape[1]
            return self._records[row] | ({"length": length} if length > int(self.last_position.max()) + 1 else {})
        columns = self.clean_tokens, self.corrupt_tokens, self.last_position
        columns += self.answers, self.corrupt_answers, self.candidates
        record: Record = {name: column[row].tolist() for name, column in zip(TOKEN_FIELDS, columns, strict=True)}
        marks = {name: int(positions[row]) for name, positions in self.marks.items()}
        return record | ({"marks": marks} if marks else {})


Metric = str | Callable[..., Float[Tensor, "B"]]


def check_metric(pairs: PromptPairs, metric: Metric | None) -> Metric:
    """The metric that is asked for, or the pairs' own if that is None; checked with the pairs.

    Raises:
        ValueError: for an unknown metric, or one that cannot tell the pairs' answers apart.
    """
    if metric is None or metric == pairs.metric:
        return pairs.metric
    return replace(pairs, metric=metric).metric


def metric_name(metric: Metric) -> str:
    """What a result says of its metric."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def scored(metric: Metric, logits: Float[Tensor, "B V"], pairs: PromptPairs) -> Float[Tensor, "B"]:
    """A metric of the full logits of one run of the pairs; of ``nld``, the logit difference.

    Raises:
        ValueError: if a callable returns anything but a number a row.
    """
    if not callable(metric):
        return measure(metric, logits, pairs.answers, pairs.corrupt_answers, pairs.candidates)
    found = metric(logits, pairs)
    if not isinstance(found, Tensor) or found.shape != (len(logits),):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the metric {metric!r} must return a tensor with a number a row, [{len(logits)}], not {what}")
    return found.to(torch.promote_types(found.dtype, torch.float32))


def check_fit(model, pairs: PromptPairs) -> None:
    """Refuse pairs with tokens that the model does not have, or that end in its tokenizer's padding.

    Raises:
        ValueError: if they do.
    """
    pairs.check_model(model.vocab_size, getattr(model.tokenizer, "pad_token_id", None))


def _with_records(records: list[Record], **columns: Any) -> PromptPairs:
    """The pairs, which keep the texts that they came from."""
    pairs = PromptPairs(**columns)
    kept = [{name: record[name] for name in KEPT_FIELDS if name in record} for record in records]
    if all("clean" in record for record in kept):
        pairs._set("_records", kept)
    return pairs


def _rows_of(column: Any, rows: Int[Tensor, "rows"]) -> Any:
    """Some rows of a field."""
    if isinstance(column, Tensor):
        return column[rows.to(column.device)]
    if isinstance(column, Marks | Groups):
        return type(column)({name: _rows_of(value, rows) for name, value in column.items()})
    return [column[row] for row in rows.tolist()] if isinstance(column, list) else column


def _union(right: Int[Tensor, "B A"], wrong: Int[Tensor, "B A2"]) -> Int[Tensor, "B C"]:
    """Each row's tokens of both, once each, padded with -1."""
    rows = [_listed(row) for row in torch.cat([right, wrong], dim=1)]
    width = max(map(len, rows), default=1)
    return right.new_tensor([row + [-1] * (width - len(row)) for row in rows]).reshape(len(rows), width)


def _listed(ids: Int[Tensor, "n"]) -> list[int]:
    """The token ids, once each, without padding."""
    return list(dict.fromkeys(token for token in ids.tolist() if token >= 0))


def _names(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
