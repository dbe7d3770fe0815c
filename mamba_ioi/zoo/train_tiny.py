"""Train the embedded models `tiny` and `tiny-mamba2` on the indirect-object task and its variations, from a seed."""

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
)

from ..tasks.ioi import TEMPLATES
from .fast_forward import fast_logits
from .found import FOUND
from .prompts import HELD_OUT_SHARE, Prompts
from .tokenizer import TINY_NAMES, build_tokenizer
from .training import checked, hf_logits, parameters, trained, write

SEED, STEPS = 0, 1200
"""Of the packaged models."""
BATCH = 64
LEARNING_RATE = 3e-3

_SHAPE = {
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "conv_kernel": 4,
    "expand": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Recipe:
    """What differs between models that are trained.

    Attributes:
        name: the model's.
        kind: of what architecture it is.
        made: the model card's first words, in which ``{seed}`` is the seed.
        sizes: its shape, for the card.
        build: the untrained model, from the size of the vocabulary.
        logits: what it gives for tokens, with gradients for the parameters.
    """

    name: str
    kind: str
    made: str
    sizes: str
    build: Callable[[int], PreTrainedModel]
    logits: Callable[[Any, Int[Tensor, "B L"]], Float[Tensor, "B L V"]]


def _mamba(vocab_size: int) -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=vocab_size, state_size=16, time_step_rank=8, **_SHAPE))


def _mamba2(vocab_size: int) -> Mamba2ForCausalLM:
    # No two sizes are alike, so that none is taken for another. A prompt fits into one chunk of the scan.
    sizes = {"num_heads": 12, "head_dim": 16, "n_groups": 1, "state_size": 32, "chunk_size": 32}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=vocab_size, **sizes, **_SHAPE))


SHIPPED = """The {kind} that mamba_ioi ships, so that every experiment runs without a network. It was made by
`mamba-ioi {command} --seed {{seed}}`."""


FAMILIES: Mapping[str, Recipe] = {
    "mamba": Recipe(
        "tiny",
        "Mamba",
        SHIPPED.format(kind="Mamba", command="train-tiny"),
        "`MambaForCausalLM`, 6 layers, d_model 96, d_inner 192, d_state 16, d_conv 4, float32,\n ",
        _mamba,
        fast_logits,
    ),
    "mamba2": Recipe(
        "tiny-mamba2",
        "Mamba-2",
        SHIPPED.format(kind="Mamba-2", command="train-tiny --family mamba2"),
        "`Mamba2ForCausalLM`, 6 layers, d_model 96, d_inner 192 (12 heads of 16), one group of B and C, d_state 32,\n"
        "  d_conv 4, float32,",
        _mamba2,
        hf_logits,
    ),
}
"""The families that can be trained, by their config's ``model_type``."""


def train(
    out: str | os.PathLike[str],
    *,
    family: str | Recipe = "mamba",
    seed: int = SEED,
    steps: int | None = None,
    n_test: int = 2000,
    progress: bool = True,
) -> dict[str, Any]:
    """Train `tiny` (or `tiny-mamba2`) and write it, its tokenizer and its model card to a folder.

    Next-token loss over whole prompts, the answer included and counted once more; AdamW, warm-up and cosine decay. The
    same seed gives the same weights on one machine.

    Args:
        out: the folder to write; made if it is not there.
        family: ``"mamba"`` for `tiny`, ``"mamba2"`` for `tiny-mamba2`, a Mamba-2 (SSD, arXiv 2405.21060), or the recipe
            of another model.
        seed: of the initial weights and of the prompts.
        steps: optimizer steps of 64 prompts; those of the packaged model if None.
        n_test: held-out prompts a template to measure on.
        progress: show a progress bar.

    Returns:
        What was measured: accuracy per template over candidates and over the vocabulary, loss, minutes of one core.

    Raises:
        ValueError: if the family is another, steps or n_test is not positive, or the folder is a file.
    """
    recipe = family if isinstance(family, Recipe) else _recipe(family)
    out, seed, steps, n_test = checked(out, seed=seed, steps=STEPS if steps is None else steps, n_test=n_test)
    tokenizer = build_tokenizer(TINY_NAMES)
    prompts = Prompts(tokenizer, TINY_NAMES)
    model, loss, passed = trained(
        recipe.build,
        len(tokenizer),
        lambda model, generator: _losses(recipe, model, prompts.batch(BATCH, generator)),
        seed=seed,
        steps=steps,
        learning_rate=LEARNING_RATE,
        progress=progress,
    )
    report: dict[str, object] = {
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "parameters": parameters(model),
        "minutes": passed,
        "final_loss": round(loss, 4),
        "n_test": n_test,
        "held_out": [measure(recipe, model, prompts, form, n_test) for form in range(4)],
    }
    write(out, model, tokenizer, report, card(recipe, report))
    return report


def _recipe(family: str) -> Recipe:
    check_family(family)
    return FAMILIES[family]


def check_family(family: str) -> None:
    """Refuse a family that is not trained on the indirect-object task.

    Raises:
        ValueError: naming those that are.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} cannot be trained; the families are {', '.join(FAMILIES)}")


def measure(recipe: Recipe, model: PreTrainedModel, prompts: Prompts, form: int, count: int) -> dict[str, float]:
    """Accuracy on prompts of one form with held-out name triples: over the prompt's names, and over the vocabulary."""
    rows, names = prompts.draw(form, count, torch.Generator().manual_seed(1000 + form), held_out=True)
    last = len(prompts.forms[form].ids) - 1
    with torch.no_grad():
        logits = torch.cat([recipe.logits(model, part)[:, last] for part in rows[:, : last + 1].split(256)])
    chosen = logits.gather(1, names).argmax(1) == 0
    return {
        "candidates": round(chosen.float().mean().item(), 4),
        "vocabulary": round((logits.argmax(1) == names[:, 0]).float().mean().item(), 4),
    }


def _losses(
    recipe: Recipe, model: PreTrainedModel, rows: Int[Tensor, "B L"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss over whole prompts with the answer's once more, and the answer's alone."""
    logits, targets = recipe.logits(model, rows[:, :-1].clamp(min=0)), rows[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    losses = losses.view(targets.shape)
    ends = (targets >= 0).sum(1) - 1
    answers = losses.gather(1, ends[:, None]).mean()
    return losses.sum() / (targets >= 0).sum() + answers, answers


def card(family: str | Recipe, report: Mapping[str, Any]) -> str:
    """The model card, in Markdown; with what was found of it if it is trained as the packaged model was.

    Args:
        family: as for `train`.
        report: what `train` measured.
    """
    one = family if isinstance(family, Recipe) else FAMILIES[family]
    packaged = one in FAMILIES.values() and (report["seed"], report["steps"]) == (SEED, STEPS)
    return _trained(one, report) + (FOUND[one.name] if packaged else "")


def _trained(recipe: Recipe, report: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {template} | {measured['candidates']:.4f} | {measured['vocabulary']:.4f} |"
        for template, measured in zip(TEMPLATES, report["held_out"], strict=True)
    )
    return f"""---
license: mit
library_name: transformers
---
# {recipe.name}: a small {recipe.kind} trained on indirect object identification

{recipe.made.format(seed=report["seed"])}

- Model: {recipe.sizes} {report["parameters"]:,} parameters.
- Tokenizer: byte-level BPE that segments the four templates as GPT-NeoX's does; {len(TINY_NAMES)} names are one token.
- Data: the four three-name templates of the paper (arXiv 2407.14008, appendix A) with every order of the names, and
  two-name variants of them (one prompt in four); 8 places, 8 objects. One unordered name triple in
  {HELD_OUT_SHARE} was never trained on.
- Training: {report["steps"]} steps of {report["batch"]} prompts, next-token loss with the answer counted once more,
  AdamW, seed {report["seed"]}; {report["minutes"]} minutes on one CPU core; last loss {report["final_loss"]}.

Accuracy on {report["n_test"]} prompts a template with held-out name triples:

| template | over the prompt's three names | over the vocabulary |
|---|---|---|
{rows}
"""
