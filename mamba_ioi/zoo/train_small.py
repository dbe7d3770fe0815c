"""Train small models of four architectures on one task: the subjects of the recall study, and of the wider check."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .fast_forward import fast_logits
from .lessons import LESSONS, Lesson, Prompts
from .training import checked, hf_logits, parameters, trained, write

BATCH, LEARNING_RATE = 64, 3e-3
LEARNED = 0.95
"""The accuracy from which a subject is said to have learned the task."""
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_MAMBA: dict[str, Any] = {"state_size": 16, "expand": 2, "tie_word_embeddings": True} | _SHAPE


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is trained.

    Attributes:
        what: the model, for its card.
        build: the model with drawn weights, from the size of the vocabulary.
        logits: with gradients for the parameters.
    """

    what: str
    build: Callable[[int], PreTrainedModel]
    logits: Callable[[Any, Int[Tensor, "B L"]], Float[Tensor, "B L V"]]


def _mamba(vocab_size: int, conv_kernel: int = 4) -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=vocab_size, conv_kernel=conv_kernel, time_step_rank=4, **_MAMBA))


def _mamba2(vocab_size: int) -> Mamba2ForCausalLM:
    sizes: dict[str, Any] = {"num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16, "conv_kernel": 4}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=vocab_size, **sizes, **_MAMBA))


def _attention(vocab_size: int) -> Qwen2ForCausalLM:
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128}
    layers: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    sizes: dict[str, Any] = {"max_position_embeddings": 64, "use_sliding_window": True, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, **heads, **layers, **sizes, **_SHAPE))


SUBJECTS: Mapping[str, Subject] = {
    "mamba": Subject(
        what="`MambaForCausalLM`, 2 layers, d_model 64, d_inner 128, d_state 16, d_conv 4",
        build=_mamba,
        logits=fast_logits,
    ),
    "mamba-noconv": Subject(
        what="`MambaForCausalLM` without the short convolution (d_conv 1), 2 layers, d_model 64, d_inner 128,\n"
        "  d_state 16",
        build=lambda vocab_size: _mamba(vocab_size, 1),
        logits=fast_logits,
    ),
    "mamba2": Subject(
        what="`Mamba2ForCausalLM`, 2 layers, d_model 64, d_inner 128 (4 heads of 32), one group of B and C,\n"
        "  d_state 16, d_conv 4",
        build=_mamba2,
        logits=hf_logits,
    ),
    "attention": Subject(
        what="`Qwen2ForCausalLM`, 2 layers of attention and MLP (128), d_model 64, 2 heads, rotary positions; the\n"
        "  first layer's attention reaches 4 tokens, as far as the short convolution of a Mamba",
        build=_attention,
        logits=hf_logits,
    ),
}
"""The subjects by name; `load_model` takes those of recall with ``recall-`` in front."""


def train(
    out: str | os.PathLike[str],
    *,
    task: str = "recall",
    family: str = "mamba",
    seed: int = 0,
    steps: int | None = None,
    n_test: int = 1000,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a small model on a task and write it, its tokenizer and its model card to a folder.

    Loss on the answers alone; AdamW, warm-up and cosine decay. The same seed gives the same weights on one machine.

    Args:
        out: the folder to write; made if it is not there.
        task: one of `LESSONS`.
        family: one of `SUBJECTS`.
        seed: of the initial weights and of the prompts.
        steps: optimizer steps of 64 prompts; the task's own number if None, that of the packaged subjects of recall.
        n_test: prompts to measure on, for each kind of test.
        progress: show a progress bar.

    Returns:
        What was measured: accuracy over the whole vocabulary by kind of test, loss, minutes of one core.

    Raises:
        ValueError: if the task or family is another, steps or n_test is not positive, or the folder is a file.
    """
    check_family(family, task)
    lesson, subject = LESSONS[task], SUBJECTS[family]
    out, seed, steps, n_test = checked(
        out, seed=seed, steps=lesson.steps[family] if steps is None else steps, n_test=n_test
    )
    tokenizer = lesson.tokenizer()
    prompts = lesson.prompts(tokenizer)
    model, loss, passed = trained(
        subject.build,
        len(tokenizer),
        lambda model, generator: _losses(subject, model, prompts.batch(BATCH, generator)),
        seed=seed,
        steps=steps,
        learning_rate=LEARNING_RATE,
        progress=progress,
    )
    report: dict[str, Any] = {
        "task": task,
        "subject": family,
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        **lesson.numbers,
        "parameters": parameters(model),
        "minutes": passed,
        "final_loss": round(loss, 4),
        "n_test": n_test,
        "accuracy": measure(subject, model, prompts, n_test),
    }
    write(out, model, tokenizer, report, card(report))
    return report


def check_family(family: str, task: str = "recall") -> None:
    """Refuse a family or a task that small models are not trained of or on.

    Raises:
        ValueError: naming those that are.
    """
    if task not in LESSONS:
        raise ValueError(f"small models are not trained on the task {task!r}, but on {', '.join(LESSONS)}")
    if family not in SUBJECTS:
        raise ValueError(f"family {family!r} cannot be trained on {task}; the families are {', '.join(SUBJECTS)}")


def measure(subject: Subject, model: PreTrainedModel, prompts: Prompts, count: int) -> dict[str, float]:
    """Accuracy over the whole vocabulary on new prompts, by the kind of test."""
    found = {}
    for name, (rows, right) in prompts.tests(count).items():
        with torch.no_grad():
            logits = torch.cat([subject.logits(model, part)[:, -1] for part in rows[:, :-1].split(250)])
        found[name] = round((logits.argmax(1, keepdim=True) == right).any(1).float().mean().item(), 4)
    return found


def _losses(
    subject: Subject, model: PreTrainedModel, rows: Int[Tensor, "B L"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss on the answers, which is all of it, twice."""
    loss = F.cross_entropy(subject.logits(model, rows[:, :-1])[:, -1], rows[:, -1])
    return loss, loss


def card(report: Mapping[str, Any]) -> str:
    """The model card, in Markdown, of what `train` measured."""
    task, family = report["task"], report["subject"]
    lesson: Lesson = LESSONS[task]
    accuracies = report["accuracy"].values()
    head, line = " | ".join(report["accuracy"]), "---|" * len(accuracies)
    row = " | ".join(f"{accuracy:.4f}" for accuracy in accuracies)
    (decisive, where), (asked, axis) = lesson.decisive, lesson.asked
    right = report["accuracy"][decisive]
    verdict = (
        f"It learns the task: {right:.4f} of the answers are right {where}."
        if right >= LEARNED
        else f"**It does not learn the task**: after {report['steps']} steps {right:.4f} of the answers are right\n"
        f"{where}; {lesson.chance}."
    )
    return f"""---
license: mit
library_name: transformers
---
# {task}-{family}: a small model trained on {lesson.about}

{lesson.made} It was made by
`mamba-ioi train --task {task} --family {family} --seed {report["seed"]}`.

- Model: {SUBJECTS[family].what}, float32,
  {report["parameters"]:,} parameters.
- Data: {lesson.data} Loss on the answers alone.
- Training: {report["steps"]} steps of {report["batch"]} prompts, AdamW, learning rate up to
  {report["learning_rate"]}, seed {report["seed"]}; {report["minutes"]} minutes on one CPU core; last loss
  {report["final_loss"]}.

{verdict}
Accuracy over the whole vocabulary, on {report["n_test"]} new prompts for each {asked}:

| {axis} | {head} |
|---|{line}
| accuracy | {row} |
"""
