"""Tasks: pairs of a clean and a corrupt prompt, drawn with a tokenizer's words or read from files.

A task is one file here, which calls its row `TASK`; it is found by itself.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from transformers import PreTrainedTokenizerBase

from .pairs import PromptPairs
from .task import Task

__all__ = ["TASKS", "PromptPairs", "Task", "generate", "register"]

TASKS: dict[str, Task] = {}
"""The tasks by name."""


def register(task: Task) -> None:
    """Let `generate` know a task; in place of an earlier one of the same name."""
    TASKS[task.name] = task


def find(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"there is no task {name!r:.80}; there are {', '.join(TASKS)}")
    return TASKS[name]


def generate(
    name: str, tokenizer: PreTrainedTokenizerBase, n_pairs: int, *, seed: int = 27, **options: Any
) -> PromptPairs:
    """Pairs of prompts of a task.

    The same arguments give the same pairs on every machine, and the first k rows do not depend on ``n_pairs``. A pair
    comes twice only where a task has hardly any other left (pairs of ``ioi`` are drawn with replacement, as the paper's
    are). The tokenizer's BOS stands in front where it has one.

    Args:
        name: one of `TASKS`.
        tokenizer: a transformers tokenizer; its words are those of the prompts.
        n_pairs: how many rows.
        seed: of the draw, 0 or more.
        **options: those of the task, ``TASKS[name].options``; its function's docstring says what they mean.

    Returns:
        ``n_pairs`` rows, with the marks, groups and metric that the task has; of ``ioi`` an `IOIDataset`.

    Raises:
        ValueError: for an unknown task or option, a value out of range, or a tokenizer that lacks what the task needs.
    """
    return find(name)(tokenizer, n_pairs, seed=seed, **options)


for _file in iter_modules(__path__):
    _task = getattr(import_module(f"{__name__}.{_file.name}"), "TASK", None)
    if _task is not None:
        register(_task)
