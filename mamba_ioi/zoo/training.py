"""What the trainings of embedded models share: where they write, how weights are drawn, the loop of steps."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import integer, whole_number

logger = logging.getLogger(__name__)


def checked(out: str | os.PathLike[str], *, seed: Any, steps: Any, n_test: Any) -> tuple[Path, int, int, int]:
    """The folder, the seed and the counts of a training.

    Raises:
        ValueError: if steps or n_test is not positive, the seed is none, or the folder is a file.
    """
    counts = [integer(steps), integer(n_test)]
    if not all(count is not None and count >= 1 for count in counts):
        raise ValueError(f"steps={steps} and n_test={n_test} must be 1 or more")
    seed = whole_number(seed, "seed", least=0)
    out = Path(os.path.expanduser(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write the model to")
    return out, seed, int(steps), int(n_test)


def initial_model(build: Callable[[int], PreTrainedModel], vocab_size: int, seed: int) -> PreTrainedModel:
    """A model with weights drawn from the seed; nothing else is drawn from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(vocab_size).train()


@contextmanager
def one_core() -> Iterator[Callable[[], float]]:
    """Compute on one thread: as fast as two at these sizes, and the sums come out in one order.

    Yields:
        A function that says how many minutes of one core have passed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.process_time()
    try:
        yield lambda: round((time.process_time() - started) / 60, 1)
    finally:
        torch.set_num_threads(threads)


def hf_logits(model: PreTrainedModel, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
    """What transformers' own forward gives."""
    return model(tokens, use_cache=False).logits


def optimize(
    model: PreTrainedModel,
    losses: Callable[[], tuple[Float[Tensor, ""], Float[Tensor, ""]]],
    steps: int,
    *,
    learning_rate: float,
    progress: bool,
) -> float:
    """Train by AdamW with warm-up and cosine decay; the last step's loss.

    Args:
        model: in training mode.
        losses: draws a batch; the loss to lower, and the part of it that is shown beside.
        steps: how many.
        learning_rate: the highest.
        progress: show a bar.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    warm_up = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3),
    )
    loss = torch.zeros(())
    with tqdm(total=steps, desc="training", disable=not progress) as bar:
        for _ in range(steps):
            loss, answers = losses()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", answer=f"{answers.item():.3f}", refresh=False)
            bar.update()
    logger.info("trained for %d steps, loss %.4f", steps, loss.item())
    return loss.item()


def trained(
    build: Callable[[int], PreTrainedModel],
    vocab_size: int,
    losses: Callable[[PreTrainedModel, torch.Generator], tuple[Float[Tensor, ""], Float[Tensor, ""]]],
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    progress: bool,
) -> tuple[PreTrainedModel, float, float]:
    """A model trained from weights of the seed on one core, in evaluation mode, with its last loss and the minutes.

    Args:
        build: makes the model, from the size of its vocabulary.
        vocab_size: that size.
        losses: as for `optimize`, from the model and a generator of the seed, which draws the batches.
        seed: of the weights and the batches.
        steps: how many.
        learning_rate: the highest.
        progress: show a bar.
    """
    model, generator = initial_model(build, vocab_size, seed), torch.Generator().manual_seed(seed)
    with one_core() as minutes:
        loss = optimize(model, lambda: losses(model, generator), steps, learning_rate=learning_rate, progress=progress)
        passed = minutes()
    return model.eval(), loss, passed


def write(
    out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any], card: str
) -> None:
    """Write a trained model, its tokenizer, its card and what was measured to a folder, made if it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parameters(model: PreTrainedModel) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
