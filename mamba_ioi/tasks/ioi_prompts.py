"""Choices of the paper's prompts for single figures: as many pairs of each kind, and a few texts alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from .ioi import BOS, CORRUPTIONS, TEMPLATES, IOIDataset
from .names import NAMES


def balanced_pairs(
    tokenizer: PreTrainedTokenizerBase,
    n_pairs: int,
    *,
    seed: int = 27,
    templates: Sequence[str] = TEMPLATES,
    corruptions: Sequence[str] = CORRUPTIONS,
) -> IOIDataset:
    """``n_pairs`` pairs of every (template, corruption), in both directions: the first of each that the seed draws.

    Args:
        tokenizer: as for `IOIDataset.generate`.
        n_pairs: pairs of each kind.
        seed: of the draw.
        templates: which templates.
        corruptions: which corruptions.

    Raises:
        ValueError: as `IOIDataset.generate`.
    """
    kinds = [(template, corruption) for template in templates for corruption in corruptions]
    draws = 2 * n_pairs * len(kinds)
    while True:
        data = IOIDataset.generate(tokenizer, draws, seed=seed, templates=templates, corruptions=corruptions)
        drawn = list(zip(data.templates[:draws], data.corruptions[:draws], strict=True))
        rows = [[row for row, other in enumerate(drawn) if other == kind][:n_pairs] for kind in kinds]
        if all(len(found) == n_pairs for found in rows):
            chosen = torch.tensor(rows).flatten()
            return data[torch.cat([chosen, chosen + draws])]
        draws *= 2


def example_prompts(tokenizer: PreTrainedTokenizerBase, *, seed: int = 27) -> list[str]:
    """Prompts for Figure 7: two drawn by the seed, and one whose names are several tokens each, if there are such.

    Raises:
        ValueError: as `IOIDataset.generate`.
    """
    drawn = IOIDataset.generate(tokenizer, 2, seed=seed, templates=[TEMPLATES[3]], symmetric=False).clean_text
    long = []
    for name in NAMES:
        ids = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        if len(ids) > 1 and tokenizer.unk_token_id not in ids:
            long.append(name)
    if len(long) < 3:
        return drawn
    one, other, third = long[:: len(long) // 3][:3]
    return [*drawn, f"Friends {one}, {other} and {third} went to the store. {one} and {other} gave a drink to"]


def with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with the token in front with which every prompt of `IOIDataset` begins.

    Raises:
        ValueError: if the tokenizer has neither ``<|endoftext|>`` nor a BOS token of its own.
    """
    bos = BOS if BOS in tokenizer.get_vocab() else tokenizer.bos_token
    if bos is None:
        raise ValueError(f"the tokenizer has neither {BOS} nor a BOS token of its own, with which every prompt begins")
    return text if text.startswith(str(bos)) else f"{bos}{text}"
