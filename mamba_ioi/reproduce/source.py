"""Pairs of another task than the paper's, for the command line: those of a file, or those that a task draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models.model import CausalLM
    from ..tasks import PromptPairs

ROWS = 80
"""How many rows a task draws if no other number is asked for."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where pairs come from: a file or a task, one of the two.

    Attributes:
        data: the file.
        task: the task's name.
        rows: how many rows the task draws; `ROWS` if None. A file's are all taken.
        seed: of the task's draw.
    """

    data: Path | None = None
    task: str | None = None
    rows: int | None = None
    seed: int = 27

    @property
    def name(self) -> str:
        """What the pairs are called: the file's name, or the task's."""
        return self.task or self.data.name  # pyright: ignore[reportReturnType, reportOptionalMemberAccess]

    def asked(self) -> dict[str, Any]:
        """What tells these pairs from others, for a result's ``meta["request"]``; the same for the same pairs alone.

        Raises:
            ValueError: if there is no such task.
            OSError: if the file cannot be read.
        """
        if self.data is not None:
            return {"data": hashlib.sha256(self.data.read_bytes()).hexdigest()}
        from ..tasks import find

        return {"task": find(self.task).name, "pairs": self.rows or ROWS, "seed": self.seed}  # pyright: ignore[reportArgumentType]

    def told(self) -> dict[str, Any]:
        """What a result's ``meta`` says of them: the file's name, or how the task was drawn."""
        return {"data": self.name} if self.task is None else self.asked()

    def held_out(self) -> Source | None:
        """Where pairs to judge on come from: the task's next seed; None of a file, whose rows are all taken."""
        return None if self.task is None else replace(self, seed=self.seed + 1)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the file or the task in front of an error that is about its rows."""
        try:
            yield
        except ValueError as error:
            if not str(error).startswith(("row ", "the data ", "the group ")):
                raise
            raise ValueError(f"{self.data or f'the task {self.task}'}: {error}") from None

    def pairs(self, model: CausalLM) -> PromptPairs:
        """The pairs, in the tokens of a model.

        Raises:
            ValueError: if the model has no tokenizer, or one that lacks what the task needs; if there is no such task,
                or the file or a row of it is not as it should be.
            OSError: if the file cannot be read.
        """
        from ..tasks import PromptPairs, generate

        if model.tokenizer is None:
            verb = "read" if self.task is None else "draw"
            raise ValueError(f"{model.model_id} has no tokenizer, which is needed to {verb} {self.data or self.task}")
        if self.data is not None:
            return PromptPairs.load(self.data, model.tokenizer)
        return generate(self.task, model.tokenizer, self.rows or ROWS, seed=self.seed)  # pyright: ignore[reportArgumentType]
