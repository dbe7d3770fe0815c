"""What a task is: a row that names it, and a function that draws pairs of prompts with a tokenizer's words."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..checks import whole_number
from .pairs import PromptPairs
from .texts import Record

TRIES = 20
"""How often a pair is drawn anew before one that was there already is taken."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, to be called for pairs of prompts.

    Attributes:
        name: its name.
        about: what it asks for, in one sentence.
        function: draws the pairs: ``(tokenizer, n_pairs, seed, **options) -> PromptPairs`` of ``n_pairs`` rows. Its
            options are parameters that are given by name and have defaults.
        source: where the task is from: papers by their arXiv ids.
        example: a row that it draws, as a file of pairs has it: ``clean``, ``corrupt``, ``answer``, ``corrupt_answer``.
    """

    name: str
    about: str
    function: Callable[..., PromptPairs]
    source: str
    example: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, with their defaults."""
        parameters = signature(self.function).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is Parameter.KEYWORD_ONLY}

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase, n_pairs: int, *, seed: int = 27, **options: Any
    ) -> PromptPairs:
        """Draw pairs; see `mamba_ioi.tasks.generate`."""
        n_pairs = whole_number(n_pairs, "n_pairs", least=1)
        seed = whole_number(seed, "seed", least=0)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"a task is drawn with a transformers tokenizer, not with {tokenizer!r:.80}")
        for name in options:
            if name not in self.options:
                known = ", ".join(f"{known}={default!r}" for known, default in self.options.items()) or "none"
                raise ValueError(f"the task {self.name} has no option {name!r}; it has {known}")
        try:
            pairs = self.function(tokenizer, n_pairs, seed, **options)
        except ValueError as error:
            raise ValueError(f"the task {self.name}: {error}") from None
        if not isinstance(pairs, PromptPairs) or len(pairs) != n_pairs:
            raise ValueError(f"the task {self.name} should give PromptPairs of {n_pairs} rows; it gave {pairs!r:.80}")
        return pairs


def draw_pairs(
    tokenizer: PreTrainedTokenizerBase,
    n_pairs: int,
    seed: int,
    draw: Callable[[random.Random], Record],
    *,
    metric: str = "logit_diff",
) -> PromptPairs:
    """Draw rows until there are enough; a pair comes twice only where hardly any other is left.

    The first k rows do not depend on ``n_pairs``.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.
        draw: gives a row as a file of pairs has it (see `PromptPairs.load`), with the random numbers that it is given.
        metric: what is measured.

    Raises:
        ValueError: if a row is not as it should be, or a text has a word that the tokenizer does not know.
    """
    rng = random.Random(seed)
    rows, seen = [], set()
    for _ in range(n_pairs):
        row = draw(rng)
        for _ in range(TRIES):
            if _prompts(row) not in seen:
                break
            row = draw(rng)
        seen.add(_prompts(row))
        rows.append(row | {"metric": metric})
    pairs = PromptPairs.from_records(tokenizer, rows)
    _check_known(tokenizer, pairs, rows)
    return pairs


def _prompts(row: Record) -> str:
    return repr([row.get(name) for name in ("clean", "corrupt", "clean_tokens", "corrupt_tokens")])


def _check_known(tokenizer: PreTrainedTokenizerBase, pairs: PromptPairs, rows: list[Record]) -> None:
    """Refuse texts with words that the tokenizer takes for its unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.bos_token_id or "clean" not in rows[0]:
        return
    for name, tokens in (("clean", pairs.clean_tokens), ("corrupt", pairs.corrupt_tokens)):
        for row, ids in enumerate(tokens.tolist()):
            if unknown in ids[: int(pairs.last_position[row]) + 1]:
                text = rows[row][name]
                words = [
                    w for w in text.split() if unknown in tokenizer(f" {w}", add_special_tokens=False)["input_ids"]
                ]
                raise ValueError(f"the tokenizer does not know {(words or [text])[0]!r}, which the prompts need")
