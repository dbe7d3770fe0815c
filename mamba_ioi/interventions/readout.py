"""Which logits of a run are read: those of the task's tokens, at each prompt's last position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..tasks.columns import check_distinct, check_ids, check_rows, integers, refuse
from ..tasks.pairs import PromptPairs


@dataclass(frozen=True)
class Readout:
    """The few logits that the task's metrics need, ``K`` token ids a row, and where each candidate stands in them.

    The columns stand for a small vocabulary: `metrics` functions take logits read at ``tokens`` together with
    ``answers``, ``corrupt_answers`` and ``candidates`` from here. Checked when it is made.

    Attributes:
        tokens: token ids to read, ``[B, K]``.
        last: the position to read at, ``[B]``.
        answers: the column of the clean answer, ``[B]``; or of a set of them, ``[B, A]``, padded with -1.
        corrupt_answers: the column of the corrupt answer, ``[B]`` or ``[B, A]``.
        candidates: the columns of the tokens that compete, ``[B, C]``, padded with -1; the answer's is one of them.
        total: whether a column more, the last, is the log of the sum of exponentials over the whole vocabulary.

    Raises:
        ValueError: if something does not fit: a sentence with row, field and value.
    """

    tokens: Int[Tensor, "B K"]
    last: Int[Tensor, "B"]
    answers: Int[Tensor, "B *A"]
    corrupt_answers: Int[Tensor, "B *A2"]
    candidates: Int[Tensor, "B C"]
    total: bool = False

    def __post_init__(self) -> None:
        dims = {"tokens": (2,), "candidates": (2,), "answers": (1, 2), "corrupt_answers": (1, 2)}
        for name in ("tokens", "last", "answers", "corrupt_answers", "candidates"):
            column = integers(getattr(self, name), name, dims=dims.get(name, (1,)))
            check_rows(len(column), len(self.tokens), name, "tokens")
            object.__setattr__(self, name, column)
        check_ids(self.tokens, "tokens")
        refuse(self.last < 0, self.last, "last", "is no position, which are counted from 0")
        width = self.tokens.shape[1]
        for name in ("answers", "corrupt_answers", "candidates"):
            columns = getattr(self, name)
            wrong = (columns < (-1 if columns.dim() == 2 else 0)) | (columns >= width)
            refuse(wrong, columns, name, f"is no column of tokens, which are 0 to {width - 1}")
        check_distinct(self.candidates, "candidates")
        answers = self.answers if self.answers.dim() == 2 else self.answers[:, None]
        missing = (self.candidates[:, :, None] != answers[:, None, :].to(self.candidates.device)).all(1)
        missing = (missing.to(answers.device) & (answers >= 0)).reshape(self.answers.shape)
        refuse(missing, self.answers, "answers", "is not among the row's candidates")

    @classmethod
    def of(cls, pairs: PromptPairs, *, total: bool = False) -> Readout:
        """Read every candidate of each pair at its last position; with ``total`` also what they are normalized by."""
        candidates = pairs.candidates
        columns = torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)

        def places(ids: Tensor) -> Tensor:
            if ids.dim() == 1:
                return (candidates == ids[:, None]).int().argmax(1)
            return (candidates[:, None, :] == ids[:, :, None]).int().argmax(2).where(ids >= 0, -1)

        return cls(
            tokens=candidates.clamp(min=0),
            last=pairs.last_position,
            answers=places(pairs.answers),
            corrupt_answers=places(pairs.corrupt_answers),
            candidates=columns.where(candidates >= 0, -1),
            total=total,
        )

    @property
    def read(self) -> Int[Tensor, "B K"]:
        """What is read: the tokens, and -1 for the column of the whole vocabulary, if there is one."""
        return torch.nn.functional.pad(self.tokens, (0, 1), value=-1) if self.total else self.tokens

    def check(self, tokens: Int[Tensor, "B L"], vocab_size: int) -> None:
        """Refuse prompts that this does not fit: other rows, fewer positions, or a smaller vocabulary.

        Raises:
            ValueError: if so.
        """
        check_rows(len(self.tokens), len(tokens), "the readout", "tokens")
        length = tokens.shape[1]
        refuse(self.last >= length, self.last, "the readout's last", f"is no position of prompts of {length} tokens")
        check_ids(self.tokens, "the readout's tokens", size=vocab_size)


def picked(logits: Float[Tensor, "B V"], read: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Each row's logits of some tokens; where the last is -1, the log of the sum of exponentials over all of them."""
    if not len(read) or not read.shape[1] or int(read[0, -1]) >= 0:
        return logits.gather(1, read)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.cat([logits.gather(1, read[:, :-1]), logits.logsumexp(1, keepdim=True)], dim=1)
