"""Train the embedded subjects of the recall study: small models of four architectures, on associative recall.

The task is that of arXiv 2505.15105: ``BOS k1 v1 … kn vn EOS kq``, which vq continues.
"""

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
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ..tasks.recall import divider_token, vocabularies
from ..tasks.words import beginning
from .fast_forward import fast_logits
from .recall_tokenizer import build_tokenizer
from .training import checked, initial_model, one_core, optimize, parameters, write

PAIRS, KEYS = 6, 32
"""How many pairs a prompt has; how many words are keys, and how many are values."""
BATCH = 64
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_MAMBA: dict[str, Any] = {"state_size": 16, "expand": 2, "tie_word_embeddings": True} | _SHAPE


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A subject of the study, and how it is trained.

    Attributes:
        what: the model, for its card.
        build: the model with drawn weights, from the size of the vocabulary.
        logits: with gradients for the parameters.
        steps: of the packaged one.
        learning_rate: the highest.
    """

    what: str
    build: Callable[[int], PreTrainedModel]
    logits: Callable[[Any, Int[Tensor, "B L"]], Float[Tensor, "B L V"]]
    steps: int
    learning_rate: float = 3e-3


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


def _plain_logits(model: Any, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
    return model(tokens, use_cache=False).logits


SUBJECTS: Mapping[str, _Subject] = {
    "mamba": _Subject(
        what="`MambaForCausalLM`, 2 layers, d_model 64, d_inner 128, d_state 16, d_conv 4",
        build=_mamba,
        logits=fast_logits,
        steps=4000,
    ),
    "mamba-noconv": _Subject(
        what="`MambaForCausalLM` without the short convolution (d_conv 1), 2 layers, d_model 64, d_inner 128,\n"
        "  d_state 16",
        build=lambda vocab_size: _mamba(vocab_size, 1),
        logits=fast_logits,
        steps=2000,
    ),
    "mamba2": _Subject(
        what="`Mamba2ForCausalLM`, 2 layers, d_model 64, d_inner 128 (4 heads of 32), one group of B and C,\n"
        "  d_state 16, d_conv 4",
        build=_mamba2,
        logits=_plain_logits,
        steps=2500,
    ),
    "attention": _Subject(
        what="`Qwen2ForCausalLM`, 2 layers of attention and MLP (128), d_model 64, 2 heads, rotary positions; the\n"
        "  first layer's attention reaches 4 tokens, as far as the short convolution of a Mamba,",
        build=_attention,
        logits=_plain_logits,
        steps=5000,
    ),
}
"""The subjects by name; `load_model` takes them with ``recall-`` in front."""


def train(
    out: str | os.PathLike[str],
    *,
    family: str = "mamba",
    seed: int = 0,
    steps: int | None = None,
    n_test: int = 1000,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a subject of the recall study and write it, its tokenizer and its model card to a folder.

    Loss on the answers alone; AdamW, warm-up and cosine decay. The same seed gives the same weights on one machine.

    Args:
        out: the folder to write; made if it is not there.
        family: one of `SUBJECTS`.
        seed: of the initial weights and of the prompts.
        steps: optimizer steps of 64 prompts; those of the packaged subject if None.
        n_test: prompts to measure on, for each number of pairs.
        progress: show a progress bar.

    Returns:
        What was measured: accuracy over the whole vocabulary by number of pairs, loss, minutes of one core.

    Raises:
        ValueError: if the family is another, steps or n_test is not positive, or the folder is a file.
    """
    check_family(family)
    subject = SUBJECTS[family]
    out, seed, steps, n_test = checked(out, seed=seed, steps=subject.steps if steps is None else steps, n_test=n_test)
    tokenizer = build_tokenizer(KEYS)
    prompts = Prompts(tokenizer)
    model = initial_model(subject.build, len(tokenizer), seed)
    generator = torch.Generator().manual_seed(seed)
    with one_core() as minutes:
        loss = optimize(
            model,
            lambda: _losses(subject, model, prompts.draw(BATCH, PAIRS, generator)),
            steps,
            learning_rate=subject.learning_rate,
            progress=progress,
        )
        passed = minutes()
    model.eval()
    report: dict[str, Any] = {
        "subject": family,
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "learning_rate": subject.learning_rate,
        "pairs": PAIRS,
        "keys": KEYS,
        "values": KEYS,
        "parameters": parameters(model),
        "minutes": passed,
        "final_loss": round(loss, 4),
        "accuracy": {str(pairs): measure(subject, model, prompts, pairs, n_test) for pairs in range(1, PAIRS + 3)},
    }
    write(out, model, tokenizer, report, _card(subject, report, n_test))
    return report


def check_family(family: str) -> None:
    """Refuse a family that is no subject of the recall study.

    Raises:
        ValueError: naming those that are.
    """
    if family not in SUBJECTS:
        raise ValueError(f"family {family!r} cannot be trained on recall; the families are {', '.join(SUBJECTS)}")


class Prompts:
    """Draws prompts of the recall task with their answers, batch by batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        keys, values = vocabularies(tokenizer)
        self.keys, self.values = torch.tensor(keys), torch.tensor(values)
        self.front, self.divider = beginning(tokenizer)[0], divider_token(tokenizer)

    def draw(self, count: int, pairs: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Whole prompts ``BOS k1 v1 … EOS kq vq``: keys and values drawn without replacement."""

        def drawn(words: Tensor) -> Tensor:
            return words[torch.rand(count, len(words), generator=generator).argsort(1)[:, :pairs]]

        both = torch.stack([drawn(self.keys), drawn(self.values)], dim=2)
        asked = torch.rand(count, pairs, generator=generator).argsort(1)[:, 0]
        front, divider = torch.full((count, 1), self.front), torch.full((count, 1), self.divider)
        return torch.cat([front, both.flatten(1), divider, both[torch.arange(count), asked]], dim=1)


def measure(subject: _Subject, model: PreTrainedModel, prompts: Prompts, pairs: int, count: int) -> float:
    """Accuracy over the whole vocabulary, on new prompts of so many pairs with one query."""
    rows = prompts.draw(count, pairs, torch.Generator().manual_seed(1000 + pairs))
    with torch.no_grad():
        logits = torch.cat([subject.logits(model, part)[:, -1] for part in rows[:, :-1].split(250)])
    return round((logits.argmax(1) == rows[:, -1]).float().mean().item(), 4)


def _losses(
    subject: _Subject, model: PreTrainedModel, rows: Int[Tensor, "B L"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss on the answers, which is all of it, twice."""
    loss = F.cross_entropy(subject.logits(model, rows[:, :-1])[:, -1], rows[:, -1])
    return loss, loss


def _card(subject: _Subject, report: dict[str, Any], n_test: int) -> str:
    name, pairs = report["subject"], report["pairs"]
    accuracies = report["accuracy"].values()
    head, line = " | ".join(report["accuracy"]), "---|" * len(accuracies)
    row = " | ".join(f"{accuracy:.4f}" for accuracy in accuracies)
    right = report["accuracy"][str(pairs)]
    verdict = (
        f"It learns the task: {right:.4f} of the answers are right at {pairs} pairs."
        if right >= LEARNED
        else f"**It does not learn the task**: after {report['steps']} steps {right:.4f} of the answers are right at\n"
        f"{pairs} pairs; chance among a prompt's values is {1 / pairs:.4f}."
    )
    return f"""---
license: mit
library_name: transformers
---
# recall-{name}: a small model trained on associative recall

A subject of mamba_ioi's recall study (the task and the question are those of arXiv 2505.15105). It was made by
`mamba-ioi train --task recall --family {name} --seed {report["seed"]}`.

- Model: {subject.what}, float32,
  {report["parameters"]:,} parameters.
- Data: `BOS k1 v1 … k{pairs} v{pairs} EOS kq`, which vq continues; {report["keys"]} keys and {report["values"]} values,
  drawn without replacement. Loss on the answers alone.
- Training: {report["steps"]} steps of {report["batch"]} prompts, AdamW, learning rate up to
  {report["learning_rate"]}, seed {report["seed"]}; {report["minutes"]} minutes on one CPU core; last loss
  {report["final_loss"]}.

{verdict}
Accuracy over the whole vocabulary, on {n_test} new prompts for each number of pairs (it was trained on {pairs} alone):

| pairs | {head} |
|---|{line}
| accuracy | {row} |
"""


LEARNED = 0.95
"""The accuracy from which a subject is said to have learned the task."""
